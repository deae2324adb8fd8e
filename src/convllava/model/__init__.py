"""The model: pixels, vision tower, projector, language model."""
