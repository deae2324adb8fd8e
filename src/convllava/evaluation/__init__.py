"""Evaluation: benchmarks, their metrics and results, and the robustness of a model."""

from convllava.evaluation.results import Result, compare, read_result
from convllava.evaluation.runner import evaluate, evaluate_all, score_file

__all__ = ["Result", "compare", "evaluate", "evaluate_all", "read_result", "score_file"]
