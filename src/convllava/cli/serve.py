"""`convllava serve`: answer OpenAI clients over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from convllava.cli.options import ImageMode, MaxPixels, Model, ShortSide, pixels
from convllava.errors import InputError


def serve(
    model: Model = "tiny",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="CONVLLAVA_API_KEY", help="Key that clients must send; setting the variable is safer."),
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Also serve a web page at /ui/.")] = False,
    allow_hosts: Annotated[str, typer.Option(help="Names of this server next to localhost, with commas between.")] = "",
    allow_urls: Annotated[str, typer.Option(help="Hosts to fetch images from, with commas between.")] = "",
    slots: Annotated[int, typer.Option(min=1, help="Answers written at the same time.")] = 8,
    context: Annotated[int | None, typer.Option(min=2, help="Most tokens of prompt and answer.")] = None,
    step_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of one step.")] = 128,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per operation; half of torch's if unset.")] = None,
    cache_mb: Annotated[int, typer.Option(min=0, help="MiB of cached image features.")] = 256,
    max_body_mb: Annotated[int, typer.Option(min=1, help="MiB of a request.")] = 20,
    max_images: Annotated[int, typer.Option(min=0, help="Images in one request.")] = 8,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Megapixels of an image file.")] = 40,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1024,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait for a slot.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request.")] = 300,
    image_mode: ImageMode = None,
    short_side: ShortSide = None,
    max_pixels: MaxPixels = None,
) -> None:
    """Answer OpenAI clients over HTTP; see docs/serving.md."""
    try:
        from convllava.serving.limits import Limits
        from convllava.serving.server import serve as run
    except ImportError as error:
        raise InputError(f"serving needs {error.name}; pip install 'convllava[serve]'") from None
    hosts, urls = ([name.strip() for name in text.split(",") if name.strip()] for text in (allow_hosts, allow_urls))
    run(
        model,
        pixels(image_mode, short_side, max_pixels),
        threads,
        host=host,
        port=port,
        api_key=api_key,
        ui=ui,
        allow_hosts=hosts,
        allow_urls=urls,
        slots=slots,
        context=context,
        step_tokens=step_tokens,
        cache_bytes=cache_mb * 2**20,
        limits=Limits(
            body_bytes=max_body_mb * 2**20,
            images=max_images,
            image_pixels=int(max_megapixels * 1e6),
            new_tokens=max_new_tokens,
            queue=max_queue,
            seconds=timeout,
        ),
    )
