"""Plugin of lmms-eval (entry point group `lmms_eval.models`): `--model convllava` is in `lmms_eval.py`."""

from typing import Any


def manifest() -> Any:
    """Return the names of our model classes."""
    from lmms_eval.models.registry_v2 import ModelManifest

    # By name, because lmms-eval is not imported completely yet when it calls this.
    module = "convllava.integrations.lmms_eval"
    return ModelManifest(
        model_id="convllava", simple_class_path=f"{module}.ConvLlavaSimple", chat_class_path=f"{module}.ConvLlavaChat"
    )
