"""Tower and projector in other runtimes give what they give here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import fresh

from convllava import InputError
from convllava.export import ImageSide, export


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_a_file_takes_images_of_any_shape(tmp_path, suffix):
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


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must end in \.onnx"):
        export(fresh()[0], tmp_path / "side.pt")


def test_a_model_that_gives_no_numbers_is_not_written_and_none_is_changed(tmp_path):
    model = fresh()[0].bfloat16().train()
    model.model.multi_modal_projector.linear_2.bias.data[0] = float("nan")
    with pytest.raises(InputError, match="differs by nan"):
        export(model, tmp_path / "side.onnx")
    assert list(tmp_path.iterdir()) == []
    assert model.dtype == torch.bfloat16
    assert model.model.vision_tower.training
