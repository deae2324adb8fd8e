"""Samples on their way to the trainer: data files, datasets, and how samples become batches."""

from typing import Literal

Format = Literal["json", "parquet", "webdataset", "datasets"]
"""Formats of data files (see `formats`). Defined here so that reading a recipe does not import the readers."""
