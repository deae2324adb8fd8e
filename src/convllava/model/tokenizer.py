"""The tokenizer of fresh models: known words are one token, everything else is spelled letter by letter.

A language model learns to spell from pages only if printed words reach it letter by letter. The words of questions and
closed answers ("what", "red", "top") cost one token each. It is BPE of Hugging Face `tokenizers` without merges: a word
is either in the vocabulary or split into characters, and unknown characters into bytes, so any text survives.
"""

import string
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD, END, IMAGE = "<|pad|>", "<|end|>", "<image>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_SPACE = "▁"
_COORDINATE = r"(?<![\d.])[01]\.\d\d(?=[,\]])"
"""A normalised coordinate in a box such as [0.12, 0.34, 0.50, 0.60]: one token each, 0.00 to 1.00."""
COORDINATES = tuple(f"{value / 100:.2f}" for value in range(101))


def build_tokenizer(words: Iterable[str], context: int = 2048) -> PreTrainedTokenizerFast:
    """Build a tokenizer in which each of `words`, also capitalised, is a single token after a space.

    Args:
        words: Lower-case words.
        context: Longest sequence of the model in tokens.
    """
    spelled = [*string.printable.strip(), _SPACE, "\n"]
    known = [_SPACE + form for word in words for form in (word, word.capitalize())]
    pieces = dict.fromkeys([PAD, END, IMAGE, *ROLES, *(f"<0x{byte:02X}>" for byte in range(256))])
    pieces |= dict.fromkeys([*spelled, *known, *COORDINATES])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}

    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True, ignore_merges=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_COORDINATE), "isolated"),
            pre_tokenizers.Split(Regex(f"{_SPACE}?[A-Za-z]+"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[IMAGE, *ROLES],
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
