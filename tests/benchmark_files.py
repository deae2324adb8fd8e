"""Small data files in the published layouts of benchmarks."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from conftest import picture
from hypothesis import HealthCheck, settings
from PIL import Image
from pyarrow.parquet import write_table

patient = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
"""Settings of property tests that do not fail on a busy machine."""


def png(seed: int = 0, height: int = 64, width: int = 64) -> bytes:
    buffer = io.BytesIO()
    picture(height, width, seed).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(seed: int = 0) -> str:
    return base64.b64encode(png(seed)).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write a TSV file as VLMEvalKit does with pandas."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet_image(seed: int = 0) -> dict[str, Any]:
    """Return an image as the datasets library stores it."""
    return {"bytes": png(seed), "path": None}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], rows_in_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=rows_in_group)
    return path


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_image(path: Path, seed: int = 0, height: int = 64, width: int = 64) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture(height, width, seed)
    image.save(path)
    return image


def circular_rows() -> list[dict[str, Any]]:
    """MMBench: two questions, each with a rotation that refers to the first row's image."""
    options = {"A": "dog", "B": "cat", "C": "", "D": ""}
    swapped = {"A": "cat", "B": "dog", "C": "", "D": ""}
    common = {"hint": "", "question": "What is it?", "l2-category": "perception"}
    return [
        {"index": 7, **common, **options, "answer": "A", "category": "object", "image": base64_png(1)},
        {"index": 8, **common, **options, "answer": "B", "category": "scene", "image": base64_png(2)},
        {"index": 1000007, **common, **swapped, "answer": "B", "category": "object", "image": "7"},
        {"index": 1000008, **common, **swapped, "answer": "A", "category": "scene", "image": "8"},
    ]


def mme_rows() -> list[dict[str, Any]]:
    """MME: two images of one subtask and one of another, two questions each, in the Parquet layout."""
    rows = []
    for category, name in (("existence", "existence/1.png"), ("existence", "existence/2.png"), ("OCR", "OCR/1.png")):
        for answer in ("Yes", "No"):
            question = f"Is it {answer}? Please answer yes or no."
            image = parquet_image(len(rows) // 2)
            rows.append(
                {"question_id": name, "image": image, "question": question, "answer": answer, "category": category}
            )
    return rows
