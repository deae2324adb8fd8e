"""Plugins that lmms-eval and vLLM load by the entry points in pyproject.toml.

The modules that an entry point names import these engines only when the engine calls them.
"""
