"""Run `transformers serve` for our model. It registers our classes first, because the command searches only
transformers.

python -m benchmarks.transformers_server serve MODEL --port 8000
"""

from __future__ import annotations

import transformers
from transformers.cli.transformers import main
from transformers.image_processing_backends import PilBackend
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from convllava.model.image_processing import ConvLlavaImageProcessorPil
from convllava.model.modeling import ConvLlavaForConditionalGeneration

if __name__ == "__main__":
    name = ConvLlavaForConditionalGeneration.__name__
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["convllava"] = name
    setattr(transformers, name, ConvLlavaForConditionalGeneration)
    # That server passes URLs of images to the processor. Our processor fetches none, so use the method of transformers.
    ConvLlavaImageProcessorPil.fetch_images = PilBackend.fetch_images  # type: ignore[method-assign]  # on purpose
    main()
