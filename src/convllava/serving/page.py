"""The web page, beside the API in one process: one model, one queue, one set of limits.

convllava serve --ui
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from PIL import Image

from convllava.display import draw_boxes
from convllava.geometry import Box, Size, parse_boxes
from convllava.model.images import load_image
from convllava.serving.budget import Budget
from convllava.serving.dialogue import Picture, Reply, Talk, reply_to
from convllava.serving.guard import KEPT_SECONDS, PAGE, PageGuard
from convllava.serving.limits import Limits
from convllava.serving.refusal import RefusalError
from convllava.serving.service import Service

EXAMPLES = Path(__file__).parents[1] / "examples"
_STYLE, _ICON = (Path(__file__).with_name(name) for name in ("page.css", "icon.svg"))
_SHOWN_SIDE = 1600
"""Most pixels of a side of a picture that is shown with boxes."""
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]


def mount_page(app: FastAPI, service: Service, api_key: str | None = None) -> None:
    """Put the page at `PAGE` of the server's application.

    Args:
        app: That `create_app` made for the service.
        service: That answers.
        api_key: That the browser asks for as a password.
    """
    folder = TemporaryDirectory(prefix="convllava-page-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name  # the one way to tell it where its files go
    _remove_in_the_end(app, folder)
    gr.mount_gradio_app(
        app,
        Page(service).build(),
        PAGE,
        theme=gr.themes.Default(primary_hue="blue", font=_FONTS, font_mono=["ui-monospace", "monospace"]),
        css_paths=_STYLE,
        footer_links=[],
        max_file_size=_file_bytes(service.limits),
        show_error=False,
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
    )
    app.add_middleware(PageGuard, gate=service.gate, limits=service.limits, folder=Path(folder.name), api_key=api_key)
    app.add_api_route("/", lambda: RedirectResponse(f"{PAGE}/"), include_in_schema=False)
    _add_icon(app)


def _add_icon(app: FastAPI) -> None:
    """Where browsers look: Gradio's page names no icon, which is then sought at the root, and a manifest that is there.

    A browser brings no password for a manifest, so both are open; they say no more than that this is our server.
    """
    place = "/favicon.ico"
    icon = {"src": place, "type": "image/svg+xml", "sizes": "any"}
    manifest = {"name": "ConvLLaVA", "start_url": f"{PAGE}/", "display": "browser", "icons": [icon]}
    app.add_api_route(place, lambda: FileResponse(_ICON), include_in_schema=False)
    app.add_api_route(
        "/manifest.json",
        lambda: JSONResponse(manifest, media_type="application/manifest+json"),
        include_in_schema=False,
    )


def _file_bytes(limits: Limits) -> int:
    """Most of a picture: in base64, as the API takes it, it has a third more."""
    return limits.body_bytes * 3 // 4


def _remove_in_the_end(app: FastAPI, folder: TemporaryDirectory[str]) -> None:
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(served: FastAPI) -> AsyncIterator[Any]:
        with folder:
            async with inner(served) as state:
                yield state

    app.router.lifespan_context = lifespan


class Page:
    """Its parts, and what happens when they are used.

    Args:
        service: That answers.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._budget = service, Budget(service.assistant)
        # Said before: what is said of a larger one are Gradio's words, in its own place.
        most = f"{_file_bytes(service.limits) / 2**20:g} MiB"
        self._invitation = _line(f"Drop a picture of at most {most}, or choose an example below.")
        self._samples = [
            (page.with_suffix(".png"), question)
            for page in sorted(EXAMPLES.glob("*.json"))
            for question in json.loads(page.read_text(encoding="utf-8"))
        ]

    def build(self) -> gr.Blocks:
        """The page, not yet mounted."""
        page = gr.Blocks(title="ConvLLaVA", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS))
        with page:
            self._talk = gr.State(Talk())
            gr.HTML(f"ConvLLaVA <span>{escape(self._service.name)}</span>", elem_id="title")
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self._lay_out_picture()
                with gr.Column(scale=6, min_width=320):
                    self._lay_out_conversation()
            self._lay_out_examples()
            self._connect()
        return page.queue(default_concurrency_limit=None, api_open=False)

    def _lay_out_picture(self) -> None:
        self._picture = gr.Image(
            show_label=False,
            type="filepath",
            sources=["upload", "clipboard"],
            height="max(220px, calc(100dvh - 324px))",
            buttons=["fullscreen"],
            elem_id="picture",
        )
        sides = self._budget.sides
        self._side = gr.Slider(
            sides[0], sides[-1], sides[-1], step=sides.step, label="Pixel budget: a square of this side", elem_id="side"
        )
        self._cost = gr.HTML(self._invitation, elem_id="cost")

    def _lay_out_conversation(self) -> None:
        self._chat = gr.Chatbot(
            show_label=False,
            height="max(280px, calc(100dvh - 290px))",
            buttons=[],
            feedback_options=None,
            latex_delimiters=[],
            placeholder="Ask as much as you like about one picture. Boxes that an answer names are drawn on it.",
            elem_id="chat",
        )
        self._facts = gr.HTML(_line(), elem_id="facts")
        self._question = gr.Textbox(
            show_label=False, placeholder="Ask about the picture", submit_btn=True, elem_id="question"
        )

    def _lay_out_examples(self) -> None:
        self._examples = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[question] for _, question in self._samples],
            sample_labels=[f"{path.stem}: {question}" for path, question in self._samples],
            type="index",
            layout="gallery",
            show_label=False,
            elem_id="examples",
        )

    def _connect(self) -> None:
        asking = self._question.submit(
            self._ask,
            [self._talk, self._question, self._side],
            [self._talk, self._chat, self._question, self._facts, self._picture],
            **_QUIET,
        )
        self._question.stop(_ready, None, self._question, cancels=[asking], **_QUIET)
        seen = [self._talk, self._picture, self._chat, self._cost, self._facts, self._question]
        # As it comes, since a component would decode a picture before its pixels are counted.
        self._picture.upload(
            self._take, [self._picture, self._side], seen, preprocess=False, cancels=[asking], **_QUIET
        )
        self._picture.clear(lambda: _begin(self._invitation), None, seen, cancels=[asking], **_QUIET)
        self._examples.click(self._take_example, [self._examples, self._side], seen, cancels=[asking], **_QUIET)
        self._chat.clear(lambda talk: Talk(talk.picture), self._talk, self._talk, cancels=[asking], **_QUIET)
        self._side.input(self._price, [self._talk, self._side], self._cost, **_QUIET)

    async def _take(self, file: dict[str, Any], side: float) -> tuple[Any, ...]:
        """A picture was dropped: a conversation about it begins."""
        path = Path(file["path"])
        try:
            with self._service.gate.entered():
                size = await self._service.measure(await asyncio.to_thread(path.read_bytes))
        except RefusalError as refusal:
            return _begin(_line(f"The picture cannot be taken: {refusal.message}.", is_wrong=True))
        return Talk(Picture(path, size)), gr.skip(), [], self._describe(size, side), _line(), _ready()

    async def _take_example(self, index: int, side: float) -> tuple[Any, ...]:
        path, question = self._samples[index]
        size = await self._service.measure(await asyncio.to_thread(path.read_bytes))
        return Talk(Picture(path, size)), path, [], self._describe(size, side), _line(), _ready(question)

    def _price(self, talk: Talk, side: float) -> Any:
        return self._describe(talk.picture.size, side) if talk.picture else gr.skip()

    def _describe(self, size: Size, side: float) -> str:
        return _line(self._budget.describe(size, self._budget.pixels(side)))

    async def _ask(self, talk: Talk, question: str, side: float) -> AsyncIterator[tuple[Any, ...]]:
        """What is shown while an answer is written; what was said of one that is stopped stays in the conversation."""
        pixels, now, box = self._budget.pixels(side), talk, _busy()
        try:
            async with aclosing(reply_to(self._service, talk, question.strip(), pixels)) as replies:
                async for reply in replies:
                    now = talk.answered(question.strip(), reply.text)
                    yield (
                        now if reply.text else talk,
                        _messages(now),
                        box,
                        self._facts_of(now, reply, pixels),
                        gr.skip(),
                    )
                    box = gr.skip()
        except RefusalError as refusal:
            line = _line(f"Not answered: {refusal.message}.", is_wrong=True)
            yield talk, _messages(talk), _ready(question), line, gr.skip()
            return
        yield now, gr.skip(), _ready(), gr.skip(), await asyncio.to_thread(self._shown, now, pixels)

    def _facts_of(self, talk: Talk, reply: Reply, pixels: int | None) -> str:
        if talk.picture is None or not reply.usage:
            return _line()
        return _line(f"{self._budget.cost(talk.picture.size, pixels).shape} \N{MIDDLE DOT} {reply.describe()}")

    def _shown(self, talk: Talk, pixels: int | None) -> Any:
        """The picture with the boxes of the last answer; as it is where only the answer before had any."""
        picture, answers = talk.picture, [turn.answer for turn in talk.turns]
        assert picture is not None
        boxes = [
            self._budget.placement(picture.size, pixels).box_from_normalised(box) for box in parse_boxes(answers[-1])
        ]
        if boxes:
            return _with_boxes(load_image(picture.path, max_image_pixels=self._service.limits.image_pixels), boxes)
        return picture.path if any(any(parse_boxes(answer)) for answer in answers[-2:-1]) else gr.skip()


def _with_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """No larger than a screen shows, since it is sent to one."""
    width = image.width
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    scale = image.width / width
    return draw_boxes(image, [(x0 * scale, y0 * scale, x1 * scale, y1 * scale) for x0, y0, x1, y1 in boxes])


def _begin(line: str) -> tuple[Any, ...]:
    """No picture and no conversation."""
    return Talk(), None, [], line, _line(), _ready()


def _messages(talk: Talk) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in talk.turns
        for role, text in (("user", turn.question), ("assistant", turn.answer or "\N{HORIZONTAL ELLIPSIS}"))
    ]


def _ready(question: str | None = None) -> Any:
    """The box for a question with its button, and with a question where there is one."""
    text = {} if question is None else {"value": question}
    return gr.Textbox(submit_btn=True, stop_btn=False, **text)


def _busy() -> Any:
    return gr.Textbox("", submit_btn=False, stop_btn=True)


def _line(text: str = "", is_wrong: bool = False) -> str:
    kind = "line wrong" if is_wrong else "line"
    return f'<div class="{kind}" role="status">{escape(text)}</div>'
