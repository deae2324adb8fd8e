"""What other engines load by their entry points (see pyproject.toml): lmms-eval and vLLM.

Nothing else needs either of them; a module beside this one that imports an engine is imported by it alone.
"""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """Of the group `lmms_eval.models`: `lmms-eval --model convllava`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    # By name, since lmms-eval is still being imported when it asks.
    classes = "convllava.integrations.lmms_eval"
    return ModelManifest(
        model_id="convllava",
        simple_class_path=f"{classes}.ConvLlavaSimple",
        chat_class_path=f"{classes}.ConvLlavaChat",
    )


def register_in_vllm() -> None:
    """Of the group `vllm.general_plugins`, called in each of vLLM's processes: `vllm serve MODEL` (docs/vllm.md).

    vLLM's backend for transformers models runs the tower as it is and gives the language model its own layers and
    paged attention. By its name it finds models of transformers alone, so ours is mapped to it here.
    """
    from vllm import ModelRegistry

    import convllava.model.auto  # noqa: F401  the Auto classes must know the model

    backend = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"
    ModelRegistry.register_model("ConvLlavaForConditionalGeneration", backend)
