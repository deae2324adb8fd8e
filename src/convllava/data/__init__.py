"""Samples on their way to the trainer: datasets, and how samples become batches."""
