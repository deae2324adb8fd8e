"""Objectives: one module for each thing that a stage can learn. `build` chooses the one of a stage."""
