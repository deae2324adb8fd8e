"""Register the model with the Auto classes of transformers when this module is imported."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from convllava.model.config import ConvLlavaConfig, ConvLlavaVisionConfig
from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration, ConvLlavaModel
from convllava.model.processing import ConvLlavaProcessor
from convllava.model.vision_tower import ConvLlavaVisionModel

for _config, _model in ((ConvLlavaVisionConfig, ConvLlavaVisionModel), (ConvLlavaConfig, ConvLlavaModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
AutoModelForImageTextToText.register(ConvLlavaConfig, ConvLlavaForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(ConvLlavaConfig, image_processor_classes={"pil": ConvLlavaImageProcessorPil}, exist_ok=True)
AutoProcessor.register(ConvLlavaConfig, ConvLlavaProcessor, exist_ok=True)
