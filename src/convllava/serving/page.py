"""The web page at /ui/: static files that call the server's own API, the example images, and the cost of an image."""

import json
from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from convllava.errors import InputError
from convllava.geometry import Size, visual_tokens
from convllava.inference.assistant import Assistant
from convllava.model.costs import tower_flops
from convllava.serving.api_error import ApiError
from convllava.serving.service import Service

STATIC = Path(__file__).with_name("static")
EXAMPLES = Path(__file__).parents[1] / "examples"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The browser contacts only this server, and no other page may show this page in a frame."""


def add_page(app: FastAPI, service: Service, check_key: Callable[[Request], None]) -> None:
    """Serve the page at `/ui/` and its data at `/ui/info`; `/` redirects to the page.

    The files need no key: the page asks for the key and sends it with each request.

    Args:
        app: The application of the service.
        service: The service.
        check_key: Raises an ApiError if a request lacks the key.
    """
    examples = [
        {"image": f"examples/{path.stem}.png", "questions": json.loads(path.read_text(encoding="utf-8"))}
        for path in sorted(EXAMPLES.glob("*.json"))
    ]

    @app.get("/ui/info")
    def info(request: Request, width: int | None = None, height: int | None = None) -> dict[str, Any]:
        """Return the model's name, the examples and, for an image of this size in pixels, its pixel budgets."""
        check_key(request)
        budgets, most = [], service.limits.image_pixels
        if width is not None and height is not None:
            try:
                if height * width > most:
                    raise InputError(
                        f"the image has {height * width / 1e6:.1f} megapixels; the limit is {most / 1e6:g}"
                    )
                budgets = pixel_budgets(service.assistant, Size(height, width))
            except InputError as error:
                raise ApiError(422, str(error), "invalid_image") from None
        return {
            "model": service.name,
            "max_file_bytes": service.limits.body_bytes * 3 // 4,  # base64 adds a third
            "examples": examples,
            "budgets": budgets,
        }

    app.add_api_route("/", lambda: RedirectResponse("/ui/"))
    app.mount("/ui/examples", _StaticFiles(directory=EXAMPLES))
    app.mount("/ui", _StaticFiles(directory=STATIC, html=True))


class _StaticFiles(StaticFiles):
    """Static files with the security headers of the page."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def pixel_budgets(assistant: Assistant, size: Size) -> list[dict[str, Any]]:
    """Return the cost of an image at each pixel budget, smallest first; the last budget is the server's own.

    Args:
        assistant: The model.
        size: Height and width of the image in pixels.

    Returns:
        Dictionaries with `side` (of a square with as many pixels as the budget), `max_pixels` (None for the server's
        own budget), `canvas` (width and height in pixels), `visual_tokens`, `tower_flops`, and `image` (left, top,
        width and height of the image on the canvas, as fractions of the canvas).

    Raises:
        InputError: if the image is empty or its aspect ratio is too extreme.
    """
    processor, config = assistant.processor.image_processor, assistant.model.config.vision_config
    stride, largest = processor.stride, isqrt(processor.budget) // processor.stride * processor.stride
    budgets = []
    for side in range(min(4 * stride, largest), largest + 1, stride):
        max_pixels = side**2 if side < largest else None
        placement = processor.placement(size, **processor.within(max_pixels))
        height, width = placement.canvas
        budgets.append(
            {
                "side": side,
                "max_pixels": max_pixels,
                "canvas": [width, height],
                "visual_tokens": visual_tokens(placement.canvas, stride, assistant.processor.row_separator),
                "tower_flops": tower_flops(config, placement.canvas),
                "image": [
                    placement.offset_x / width,
                    placement.offset_y / height,
                    placement.scale_x * size.width / width,
                    placement.scale_y * size.height / height,
                ],
            }
        )
    return budgets
