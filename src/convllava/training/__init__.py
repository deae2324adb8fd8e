"""Recipes and the engine that runs them."""
