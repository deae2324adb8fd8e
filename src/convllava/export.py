"""The image side of a model, tower and projector, for other runtimes: ONNX and OpenVINO, with any height and width.

    convllava export tiny image-side.onnx        # or image-side.xml for OpenVINO

The file takes `pixel_values` (1, channels, height, width), sides multiples of the tower's stride, as the model's image
processor makes them, and gives `tokens` (visual tokens, width of the language model), row separators included.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convllava.errors import InputError
from convllava.model.modeling import ConvLlavaForConditionalGeneration

OPSET = 18
TOLERANCE = 1e-4
_MOST = 512
"""Rows and columns of tokens, at most."""
_CHECKED = ((2, 3), (1, 1), (5, 2), (1, 7))
"""Rows and columns of tokens of the images on which the file is compared with the model."""


class ImageSide(nn.Module):
    """Pixels of one image -> what the language model reads."""

    def __init__(self, model: ConvLlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(1, channels, height, width) -> (visual tokens, width of the language model)."""
        return self.projector(self.tower([pixel_values[0]]))[0]


def export(model: ConvLlavaForConditionalGeneration, path: Path) -> float:
    """Write the image side as `.onnx`, or as `.xml` and `.bin` of OpenVINO, and compare it with the model.

    Args:
        model: Of any precision; the file is in float32.
        path: Ends in .onnx or .xml.

    Returns:
        The largest difference found on images of four shapes.

    Raises:
        InputError: another ending, a package that is missing, or a difference above 1e-4; nothing is written then.
    """
    if path.suffix not in (".onnx", ".xml"):
        raise InputError(f"{path} must end in .onnx, or in .xml for OpenVINO")
    side = copy.deepcopy(ImageSide(model)).float().eval()
    stride = model.config.vision_config.stride
    with tempfile.TemporaryDirectory(dir=_existing(path.parent), prefix=".export-") as folder:
        draft = Path(folder) / "image-side.onnx"
        _write_onnx(side, stride, model.config.vision_config.num_channels, draft)
        if path.suffix == ".xml":
            draft = _as_openvino(draft)
        difference = compare(side, draft, stride)
        if not difference <= TOLERANCE:  # nor where it is not a number
            raise InputError(f"the exported file differs by {difference:.1e} from the model, more than {TOLERANCE:g}")
        for file in sorted(draft.parent.glob(f"{draft.stem}.*")):
            if path.suffix == ".onnx" or file.suffix != ".onnx":
                file.replace(path.with_suffix(file.suffix))
    return difference


def _existing(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}") from None
    return folder


def _write_onnx(side: ImageSide, stride: int, channels: int, path: Path) -> None:
    _need("onnxscript")
    height, width = (stride * torch.export.Dim(name, min=1, max=_MOST) for name in ("rows", "columns"))
    example = torch.zeros(1, channels, 3 * stride, 4 * stride)
    # The exporter tells of its progress and of what it does not find; neither is of use to who asked for a file.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            side, (example,), dynamic_shapes={"pixel_values": {2: height, 3: width}}, strict=False
        )
        written: Any = torch.onnx.export(
            program,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=["tokens"],
        )
    written.save(path, external_data=False)


def _as_openvino(path: Path) -> Path:
    openvino = _need("openvino")
    target = path.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(path), target, compress_to_fp16=False)
    return target


def compare(side: ImageSide, path: Path, stride: int) -> float:
    """The largest difference between a file and the model on images of four shapes."""
    run = _opened(path)
    differences = []
    for rows, columns in _CHECKED:
        generator = torch.Generator().manual_seed(rows * columns)
        pixels = torch.randn(1, side.tower.config.num_channels, rows * stride, columns * stride, generator=generator)
        with torch.no_grad():
            expected = side(pixels).numpy()
        differences.append(float(np.abs(run(pixels.numpy()) - expected).max()))
    return float(np.max(differences))


def _opened(path: Path) -> Any:
    """A function from pixels to tokens that runs the file."""
    if path.suffix == ".onnx":
        session = _need("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(["tokens"], {"pixel_values": pixels})[0]
    compiled = _need("openvino").compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: compiled(pixels)[0]


def _need(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise InputError(f"export needs {package}; pip install 'convllava[export]'") from None
