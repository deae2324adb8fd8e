"""The Python API: its names, its types, and the code of docs/python.md."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
from benchmark_files import circular_rows, write_tsv
from PIL import Image

import convllava
from convllava.geometry import Size, visual_tokens

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
FINETUNING = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
NAMES = [
    "Assistant",
    "CheckpointError",
    "ConfigError",
    "ConvLlavaConfig",
    "ConvLlavaForConditionalGeneration",
    "ConvLlavaImageProcessorPil",
    "ConvLlavaModel",
    "ConvLlavaProcessor",
    "ConvLlavaVisionConfig",
    "ConvLlavaVisionModel",
    "DataError",
    "ImageError",
    "InputError",
    "Recipe",
    "Result",
    "World",
    "build",
    "convert",
    "evaluate",
    "load",
    "train",
]


def test_exported_names():
    assert sorted(NAMES) == convllava.__all__ == dir(convllava)
    for name in NAMES:
        assert getattr(convllava, name).__name__ == name
        assert name in PAGE or name.startswith("ConvLlava"), f"docs/python.md does not show {name}"


def test_type_checkers_see_the_exported_names():
    tree = ast.parse(Path(convllava.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name: node.module for node in block.body for alias in node.names}
    assert imported == {name: f"convllava.{module}" for name, module in convllava._MODULES.items()}
    assert resources.files("convllava").joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", ["build", "convert", "evaluate", "load", "train"])
def test_functions_have_types_and_documented_arguments(name):
    function = getattr(convllava, name)
    parameters = inspect.signature(function).parameters
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty
    for parameter in parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.name in function.__doc__, f"the docstring of {name} does not name {parameter.name}"


def test_import_is_light_whatever_the_arguments_are(tmp_path):
    for name in ("convllava", "program"):  # the first is the name of our own command
        program = tmp_path / name
        program.write_text("import sys, convllava; print('torch' in sys.modules, 'transformers' in sys.modules)")
        run = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
        assert run.stdout.split() == ["False", "False"]


def test_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "src/convllava/examples/receipt.png", "page.png")
    write_tsv(Path("MMBench_DEV_EN.tsv"), circular_rows())
    shutil.copytree(ROOT / "tests/data/official/checkpoint", "ConvLLaVA/ConvLLaVA-sft-1536")
    (own_images,) = re.findall(r"```python\n(.*?)```", FINETUNING, re.DOTALL)
    exec(compile(own_images, "finetuning.md", "exec"), {})
    lora = (ROOT / "recipes/lora.yaml").read_text(encoding="utf-8")
    Path("recipes").mkdir()
    Path("recipes/lora.yaml").write_text(re.sub(r"epochs: \d+", "steps: 2", lora), encoding="utf-8")
    names: dict[str, object] = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "python.md", "exec"), names)
    assert Path("runs/mine/0-lora/adapter_config.json").exists()
    assert Path("my-model/config.json").exists()
    assert Path("result.json").exists()
    shapes = [tuple(tokens.shape) for tokens in names["features"].pooler_output]
    processor = names["processor"]
    page = Size(*reversed(Image.open("page.png").size))
    for shape, size in zip(shapes, (page, Size(page.width, page.height)), strict=True):
        canvas = processor.image_processor.placement(size).canvas
        assert shape[0] == visual_tokens(canvas, processor.image_processor.stride, processor.row_separator)
