"""The vision tower: `model` has its modules and the path that trains, `inference` and `streaming` the same numbers
without gradients, in place and band by band."""

from convllava.vision.model import ConvLlavaStageFeatures, ConvLlavaVisionModel, ConvLlavaVisionOutput

__all__ = ["ConvLlavaStageFeatures", "ConvLlavaVisionModel", "ConvLlavaVisionOutput"]
