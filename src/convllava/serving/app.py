"""The HTTP application: its paths, the steps from the body of a chat request to the answer, and error responses."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from convllava.serving.api_error import ApiError, out_of_time
from convllava.serving.connection import cancel_on_disconnect, discard_body, read_body
from convllava.serving.page import add_page
from convllava.serving.replies import Completion, server_sent_event
from convllava.serving.service import Service, unknown_model

_LAST_EVENT_SECONDS = 0.5


def create_app(service: Service, api_key: str | None = None, ui: bool = False) -> FastAPI:
    """Return the application of a service. Its lifespan starts the engine and closes the service.

    Args:
        service: The service.
        api_key: Key that every request must send as `Authorization: Bearer KEY`, except those to `/health`, `/ready`
            and the files of the page.
        ui: Serve the web page too.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.admission.is_draining = True
        await asyncio.to_thread(service.close)

    app = FastAPI(title="ConvLLaVA", openapi_url=None, lifespan=lifespan)
    app.state.service = service
    for kind in (ApiError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _send_error)
    card = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "convllava"}

    def check_key(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if api_key is None or (
            scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), api_key.encode())
        ):
            return
        raise ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        if service.admission.is_draining:
            return JSONResponse({"status": "draining"}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_key(request)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        check_key(request)
        if name != service.name:
            raise unknown_model(name, service.name)
        return card

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        """Check the request, read it, prepare its prompt, let the engine write, and reply."""
        arrived = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + service.limits.seconds
        with service.metrics.count_errors():
            async with AsyncExitStack() as stack:  # at the end: free the slots, then end the request's count
                try:
                    async with asyncio.timeout_at(deadline):
                        try:
                            check_key(request)
                            stack.enter_context(service.admission.admit())
                            preparing = service.prepare(await read_body(request, service.limits))
                        except ApiError:
                            await discard_body(request)
                            raise
                        prepared = await cancel_on_disconnect(request.receive, preparing)
                        completion = Completion(service, prepared, arrived)
                        stack.callback(completion.cancel)
                        response: Response
                        if prepared.request.stream:
                            response = EventStream(service, completion, deadline, stack.pop_all())
                        else:
                            response = JSONResponse(await cancel_on_disconnect(request.receive, completion.whole()))
                except TimeoutError:
                    raise out_of_time(service.limits.seconds) from None
        service.metrics.requests.labels(response.status_code).inc()
        return response

    if ui:
        add_page(app, service, check_key)
    return app


class EventStream(Response):
    """A completion as server-sent events, with a deadline.

    Neither Starlette's StreamingResponse nor sse-starlette is used: they have no deadline for the whole stream, and
    sse-starlette ends streams at the first SIGTERM, where this server finishes them.

    It closes `stack` after the last event, or when the client disconnects. The deadline is a time of the event loop.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, completion: Completion, deadline: float, stack: AsyncExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._service, self._completion, self._deadline, self._stack = service, completion, deadline, stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stack:
            with suppress(ApiError, OSError, TimeoutError):  # the client is gone or does not read
                await cancel_on_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async def send_event(text: str) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with asyncio.timeout_at(self._deadline):
                async for event in self._completion.stream():
                    await send_event(event)
        except (TimeoutError, ApiError) as failed:
            error = failed if isinstance(failed, ApiError) else out_of_time(self._service.limits.seconds)
            # The request was counted with status 200 when the stream began.
            self._service.metrics.errors.labels(error.code).inc()
            async with asyncio.timeout(_LAST_EVENT_SECONDS):  # a client that does not read would block this
                await send_event(server_sent_event(error.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_error(request: Request, error: Exception) -> Response:
    match error:
        case ApiError():
            failed = error
        case HTTPException():
            message = f"{request.method} {request.url.path}: {error.detail}"
            failed = ApiError(error.status_code, message, "unknown_url")
        case RequestValidationError():
            first = error.errors()[0]
            field = str(first["loc"][-1])
            failed = ApiError(400, f"{field}: {first['msg']}", "invalid_request", field)
        case _:
            failed = ApiError(500, "the server failed; see its log", "internal_error")
    return JSONResponse(failed.body, failed.status, failed.headers)
