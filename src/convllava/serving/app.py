"""The HTTP side: who may come in, what is asked, what is answered."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from convllava.serving.job import Job, error_line
from convllava.serving.refusal import RefusalError, too_late
from convllava.serving.service import Service, no_such_model
from convllava.serving.transport import EventStream, discard_body, read_body, unless_gone


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application of one service; its lifespan starts the engine and closes the service.

    Args:
        service: What answers.
        api_key: That every request but `/health` and `/ready` must bring as `Authorization: Bearer KEY`.
    """
    app = FastAPI(title="ConvLLaVA", openapi_url=None, lifespan=_lifespan(service))
    app.state.service = service
    app.add_exception_handler(RefusalError, _answer_refusal)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_failure)
    created = int(time.time())
    card = {"id": service.name, "object": "model", "created": created, "owned_by": "convllava"}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        if service.gate.is_draining:
            return JSONResponse({"status": "draining"}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        _authorise(request, api_key)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        _authorise(request, api_key)
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        _authorise(request, api_key)
        if name != service.name:
            raise no_such_model(name, service.name)
        return card

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        with service.metrics.counting():
            response = await _chat(service, request, api_key)
        service.metrics.requests.labels(response.status_code).inc()
        return response

    return app


def _lifespan(service: Service) -> Any:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.gate.drain()
        await asyncio.to_thread(service.close)

    return lifespan


async def _chat(service: Service, request: Request, api_key: str | None) -> Response:
    arrived = time.perf_counter()
    deadline = asyncio.get_running_loop().time() + service.limits.seconds
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout_at(deadline):
                reading = _read(service, request, api_key, stack)
                prepared = await unless_gone(request.receive, service.prepare(await reading))
                job = Job(service, prepared, arrived)
                stack.callback(job.cancel)
                if not job.request.stream:
                    return JSONResponse(await unless_gone(request.receive, job.completion()))
        except TimeoutError:
            raise too_late(service.limits.seconds) from None
        late = partial(_broken_off, service, too_late(service.limits.seconds))
        return EventStream(_lines(service, job), deadline, late, stack.pop_all())


async def _read(service: Service, request: Request, api_key: str | None, stack: AsyncExitStack) -> bytes:
    """Let a request in for as long as the stack is open, and take its body."""
    try:
        _authorise(request, api_key)
        stack.enter_context(service.gate.entered())
        return await read_body(request, service.limits)
    except RefusalError:
        await discard_body(request)
        raise


async def _lines(service: Service, job: Job) -> AsyncIterator[str]:
    """A job's events; a stream that breaks off says why."""
    try:
        async for line in job.lines():
            yield line
    except RefusalError as refusal:
        yield _broken_off(service, refusal)


def _broken_off(service: Service, refusal: RefusalError) -> str:
    """The event that ends a stream before its time."""
    service.metrics.broke_off(refusal)
    return error_line(refusal)


def _authorise(request: Request, api_key: str | None) -> None:
    if api_key is None:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), api_key.encode()):
        raise RefusalError(401, "give the server's key as Authorization: Bearer KEY", "invalid_api_key")


async def _answer_refusal(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, RefusalError)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _answer_refusal(request, RefusalError(error.status_code, message, "unknown_url"))


async def _answer_failure(request: Request, error: Exception) -> Response:
    return await _answer_refusal(request, RefusalError(500, "the server failed; its log says why", "internal_error"))
