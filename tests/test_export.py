"""Exported vision tower and projector: other runtimes give the outputs of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import fresh

from convllava import InputError
from convllava.export import ImageSide, export


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_exported_outputs_equal_torch_for_another_shape(tmp_path, suffix):
    model, _ = fresh()
    path = tmp_path / "out" / f"side{suffix}"
    assert export(model, path) < 1e-4
    assert {file.suffix for file in path.parent.iterdir()} == ({".onnx"} if suffix == ".onnx" else {".xml", ".bin"})
    pixels = torch.randn(1, 3, 448, 64)
    with torch.no_grad():
        expected = ImageSide(model)(pixels).numpy()
    np.testing.assert_allclose(run(path, pixels.numpy()), expected, atol=1e-4)


def run(path, pixels):
    if path.suffix == ".onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(str(path)).run(None, {"pixel_values": pixels})[0]
    import openvino

    return openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(pixels)[0]


def test_unknown_file_extension_is_rejected(tmp_path):
    with pytest.raises(InputError, match=r"must end in \.onnx"):
        export(fresh()[0], tmp_path / "side.pt")


def test_model_with_nan_output_is_neither_written_nor_changed(tmp_path):
    model = fresh()[0].bfloat16().train()
    model.model.multi_modal_projector.linear_2.bias.data[0] = float("nan")
    with pytest.raises(InputError, match="differs by nan"):
        export(model, tmp_path / "side.onnx")
    assert list(tmp_path.iterdir()) == []
    assert model.dtype == torch.bfloat16
    assert model.model.vision_tower.training
