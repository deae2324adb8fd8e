"""Entry points name existing functions, in modules that import neither lmms-eval nor vLLM."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path

GROUPS = ("lmms_eval.models", "vllm.general_plugins")


def test_entry_points_load_without_importing_lmms_eval_or_vllm():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for group in GROUPS:
        module, _, name = project["entry-points"][group]["convllava"].partition(":")
        assert callable(getattr(import_module(module), name))
    assert not {"lmms_eval", "vllm"} & set(sys.modules)
