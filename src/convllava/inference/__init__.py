"""Asking a model about images."""

from convllava.inference.assistant import Assistant, Message, load

__all__ = ["Assistant", "Message", "load"]
