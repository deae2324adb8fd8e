"""Samples on their way to the trainer: datasets, and how samples become batches."""

from typing import Literal

Format = Literal["json", "parquet", "webdataset", "datasets"]
"""Of data files (see `formats`). Named here, where a recipe can be read without importing what reads the data."""
