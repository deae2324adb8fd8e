"""Measurements of speed and memory, each compared with a named baseline: `python -m benchmarks SUITE`."""

from __future__ import annotations

from typing import NamedTuple


class Suite(NamedTuple):
    """One suite: what it measures, and the options that it reads (all suites read `--repeats`)."""

    help: str
    options: frozenset[str]


_TOWER = frozenset({"towers", "sides"})
SUITES = {
    "tower": Suite("inference of the tower, against transformers' ConvNeXt: time and memory", _TOWER),
    "mixed-shapes": Suite("images of several shapes together, one by one, and padded", _TOWER),
    "scale": Suite("a small tower on up to 67 megapixels", frozenset()),
    "first-token": Suite("encoder and prefill; with --peers also of other models", _TOWER | {"language", "peers"}),
    "training": Suite("forward and backward of the tower, against transformers' ConvNeXt", _TOWER),
    "packing": Suite("a training step with packed sequences, padded ones, and in bfloat16", _TOWER | {"language"}),
    "batching": Suite("micro-batches filled to a budget, against a fixed number of samples", frozenset({"sides"})),
    "frozen-features": Suite("a training step with and without a cache of frozen stages", _TOWER | {"language"}),
    "pixels": Suite("from a JPEG file to the tower's input, against transformers", frozenset({"sides"})),
    "data": Suite("reading, checking and encoding records of Parquet and tar files", frozenset()),
    "decoding": Suite("one decoding step of the engine, against `generate`", frozenset({"language"})),
    "serving": Suite(
        "many clients of `convllava serve`; with --peers and --vllm also of other servers",
        _TOWER | {"language", "peers", "vllm", "tokens"},
    ),
}
"""All suites by name."""
