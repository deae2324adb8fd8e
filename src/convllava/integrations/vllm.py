"""Plugin of vLLM: `vllm serve MODEL` (docs/vllm.md)."""


def register() -> None:
    """Register the model. vLLM calls this in each of its processes (entry point group `vllm.general_plugins`).

    vLLM's backend for transformers models runs the tower as it is, and gives the language model its own layers and
    paged attention. vLLM selects this backend by name only for models inside transformers, so ours is mapped to it.
    """
    from vllm import ModelRegistry

    import convllava.model.auto  # noqa: F401  registers the Auto classes

    backend = "vllm.model_executor.models.transformers:TransformersMultiModalForCausalLM"
    ModelRegistry.register_model("ConvLlavaForConditionalGeneration", backend)
