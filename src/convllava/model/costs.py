"""Floating-point operations of a forward pass. A multiplication and an addition count as two.

Norms and activations are not counted, as in `torch.utils.flop_counter`. The numbers equal those of the counter on the
meta device; on a CPU the counter does not count fused attention.
"""

from typing import Any

from convllava.geometry import Size
from convllava.model.config import ConvLlavaVisionConfig


def tower_flops(config: ConvLlavaVisionConfig, canvas: Size) -> int:
    """Return the operations of the vision tower on one image of this size in pixels.

    Per pixel, a block with C channels has 16 C^2 operations in its MLP and 98 C in its depthwise convolution (ConvNeXt,
    arXiv 2201.03545).
    """
    pixels = canvas.height * canvas.width // config.patch_size**2
    before, total = config.num_channels, 0
    for stage, (depth, width) in enumerate(zip(config.depths, config.hidden_sizes, strict=True)):
        pixels = pixels // 4 if stage else pixels
        window = 4 if stage else config.patch_size**2
        total += 2 * pixels * window * before * width + depth * pixels * (16 * width**2 + 98 * width)
        before = width
    return total


def prefill_flops(text: Any, tokens: int) -> int:
    """Return the operations of a Llama-like language model, without its head, on a prompt of `tokens` tokens.

    Attention counts as if every token attended to all tokens, as kernels without a causal shortcut compute it.
    """
    width = text.hidden_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    keys = 2 * head * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
    queries = head * text.num_attention_heads
    layer = 2 * tokens * width * (2 * queries + keys + 3 * text.intermediate_size) + 4 * tokens**2 * queries
    return text.num_hidden_layers * layer + head * tokens  # angles of rotary embeddings, once for all layers
