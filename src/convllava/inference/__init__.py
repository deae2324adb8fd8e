"""Ask a model about images: `convllava.load(...)` returns an `Assistant`."""

from convllava.inference.assistant import Assistant, load
from convllava.inference.types import EncodedImage, Message, Report

__all__ = ["Assistant", "EncodedImage", "Message", "Report", "load"]
