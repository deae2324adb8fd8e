"""Export tower and projector to ONNX or OpenVINO, for images of any height and width.

    convllava export tiny image-side.onnx        # or image-side.xml for OpenVINO

The file takes `pixel_values` (1, channels, height, width) from the model's image processor; the sides are multiples of
the tower's stride. It returns `tokens` (visual tokens, width of the language model), row separators included.
"""

import copy
import logging
import tempfile
import warnings
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convllava.errors import ConfigError, InputError
from convllava.model.modeling import ConvLlavaForConditionalGeneration

OPSET = 18
TOLERANCE = 1e-4
"""Largest difference between file and model."""
_MAX_GRID = 512
"""Most rows and columns of visual tokens."""
_CHECKED_GRIDS = ((2, 3), (1, 1), (5, 2), (1, 7))
"""Rows and columns of visual tokens of the images that are compared."""


class ImageSide(nn.Module):
    """Tower and projector: the pixels of one image -> the tokens that the language model reads."""

    def __init__(self, model: ConvLlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(1, channels, height, width) -> (visual tokens, width of the language model)."""
        return self.projector(self.tower([pixel_values[0]]))[0]


def export(model: ConvLlavaForConditionalGeneration, path: Path) -> float:
    """Write tower and projector as `.onnx`, or as OpenVINO's `.xml` and `.bin`, and compare the file with the model.

    Args:
        model: In any precision; the file is in float32.
        path: Ends in .onnx or .xml.

    Returns:
        The largest difference on images of four shapes.

    Raises:
        InputError: if `path` has another extension, a package is missing, or the difference is above 1e-4. Then no file
            is written.
    """
    if path.suffix not in (".onnx", ".xml"):
        raise ConfigError(f"`path` {path} must end in .onnx, or in .xml for OpenVINO")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be written: {error.strerror}") from None
    side = copy.deepcopy(ImageSide(model)).float().eval()
    stride, channels = model.config.vision_config.stride, model.config.vision_config.num_channels
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        written = Path(folder) / "image-side.onnx"
        _write_onnx(side, torch.zeros(1, channels, 3 * stride, 4 * stride), stride, written)
        if path.suffix == ".xml":
            openvino = _import("openvino")
            converted = openvino.convert_model(written)
            written = written.with_suffix(".xml")
            openvino.save_model(converted, written, compress_to_fp16=False)
        difference = _difference(side, written, stride, channels)
        if not difference <= TOLERANCE:  # also true for nan
            raise InputError(f"the exported file differs by {difference:.1e} from the model, more than {TOLERANCE:g}")
        for file in sorted(written.parent.glob(f"{written.stem}.*")):
            if path.suffix == ".onnx" or file.suffix != ".onnx":
                file.replace(path.with_suffix(file.suffix))
    return difference


def _write_onnx(side: ImageSide, example: Tensor, stride: int, path: Path) -> None:
    _import("onnxscript")
    height, width = (stride * torch.export.Dim(name, min=1, max=_MAX_GRID) for name in ("rows", "columns"))
    shapes = {"pixel_values": {2: height, 3: width}}
    # The exporter logs its progress and optional packages that are missing; neither helps a user.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(side, (example,), dynamic_shapes=shapes, strict=False)
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


def _difference(side: ImageSide, path: Path, stride: int, channels: int) -> float:
    """Return the largest difference between a file and the model on images of four shapes."""
    if path.suffix == ".onnx":
        session = _import("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        run = partial(session.run, ["tokens"])
    else:
        run = _import("openvino").compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    differences = []
    for rows, columns in _CHECKED_GRIDS:
        generator = torch.Generator().manual_seed(rows * columns)
        pixels = torch.randn(1, channels, rows * stride, columns * stride, generator=generator)
        with torch.no_grad():
            expected = side(pixels).numpy()
        differences.append(np.abs(run({"pixel_values": pixels.numpy()})[0] - expected).max())
    return float(np.max(differences))


def _import(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise InputError(f"export needs {package}; pip install 'convllava[export]'") from None
