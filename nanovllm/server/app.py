"""The routes: what each endpoint asks of the engine, and how refusals look."""

import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any, NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from nanovllm import __version__
from nanovllm.errors import FieldError, InvalidRequestError, NanoVLLMError
from nanovllm.server.chat import chat_job
from nanovllm.server.completions import completion_job
from nanovllm.server.guard import Guard
from nanovllm.server.metrics import CONTENT_TYPE
from nanovllm.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingBody,
    TokenizeRequest,
)
from nanovllm.server.replies import error_body, error_reply, error_type
from nanovllm.server.respond import Job, Json, JsonResponse, respond
from nanovllm.server.service import Service, UnknownModelError
from nanovllm.server.tools import check_tools

logger = logging.getLogger("nanovllm.server")


def build_app(service: Service) -> ASGIApp:
    """The server as an ASGI application, with its guard in front."""
    app = FastAPI(
        title="Nano-vLLM",
        version=__version__,
        root_path=service.config.root_path,
        exception_handlers={
            RequestValidationError: show_invalid_body,
            HTTPException: show_http_error,
            NanoVLLMError: show_error,
        },
    )
    app.router.route_class = JsonRoute
    add_operation(app, service)
    add_generation(app, service)
    app.add_middleware(
        Guard,
        state=service.state,
        api_keys=service.config.api_key,
        max_body_bytes=service.config.max_body_bytes,
    )
    return app


def add_generation(app: FastAPI, service: Service) -> None:
    """What makes or counts tokens."""

    @app.post("/v1/completions", responses=ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts."""
        return await answer(await completion_job(service, body), body, request)

    @app.post("/v1/chat/completions", responses=ERRORS)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await answer(await chat_job(service, body), body, request)

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text or of a conversation."""
        engine, _ = service.engine, service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError(
                "prompt", body.prompt, "give a prompt or messages, one of them"
            )
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            ids = await engine.encode(body.prompt, add_special_tokens=special)
        else:
            _, ids = await engine.render(
                body.messages or [],
                tools=check_tools(body.tools, None).tools,
                add_generation_prompt=body.add_generation_prompt,
                add_special_tokens=body.add_special_tokens is True,
                chat_template_kwargs=body.chat_template_kwargs,
            )
        shown = None
        if body.return_token_strs:
            shown = await engine.llm.in_background(engine.token_strings, ids)
        length = engine.llm.config.max_model_len or engine.max_num_tokens
        return JsonResponse(
            {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": shown}
        )

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        engine, _ = service.engine, service.check_model(body.model)
        engine.check_ids(body.tokens)
        return JsonResponse({"prompt": await engine.llm.in_background(engine.decode, body.tokens)})

    async def answer(job: Job, body: SamplingBody, request: Request) -> Response:
        if service.config.log_requests:
            line = {"request_id": request.state.request_id, "engine_ids": job.response_id}
            params = asdict(job.requests[0].params)
            num_tokens = [len(one.prompt_token_ids) for one in job.requests]
            line |= {"prompt_tokens": num_tokens, "sampling_params": params}
            logger.info(json.dumps(line, default=str))
        options = body.stream_options.model_dump() if body.stream_options else {}
        receive, limit_s = request.receive, service.config.write_timeout
        stream = bool(body.stream)
        return await respond(job, receive, stream=stream, options=options, write_timeout_s=limit_s)


def add_operation(app: FastAPI, service: Service) -> None:
    """What operators and their tools ask."""

    @app.get("/health")
    async def health() -> Response:
        """200 if requests are taken, else 503 and why."""
        problem = service.problem
        return JsonResponse({"status": problem or "ok"}, 503 if problem else 200)

    @app.get("/version")
    async def version() -> Response:
        return JsonResponse({"version": __version__})

    @app.get("/load")
    async def load() -> Response:
        """Requests under way."""
        return JsonResponse({"server_load": service.state.num_in_flight})

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        text = service.loaded.metrics.render() if service.loaded else b""
        text = text if isinstance(text, bytes) else await text
        return Response(text, media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> Response:
        return JsonResponse(
            {"object": "list", "data": [card(name) for name in service.model_names]}
        )

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        return JsonResponse(card(service.check_model(model)))

    def card(name: str) -> Json:
        return {
            "id": name,
            "object": "model",
            "created": service.started_s,
            "owned_by": "nano-vllm",
            "root": service.model_names[0],
            "max_model_len": service.engine.max_num_tokens,
        }

    if service.config.enable_dev_endpoints:

        @app.post("/reset_prefix_cache")
        async def reset_prefix_cache() -> Response:
            """Forget all cached prefixes."""
            service.engine.llm.reset_prefix_cache()
            return JsonResponse({})


class JsonRequest(Request):
    """A request whose body is JSON as the standard has it: no NaN, nothing nested without end."""

    async def json(self) -> Any:
        try:
            value = json.loads(await self.body(), parse_constant=refuse_constant)
            check_depth(value)
            return value
        except RecursionError:
            raise HTTPException(400, TOO_DEEP) from None
        except UnicodeDecodeError:
            raise HTTPException(400, "the body must be JSON in UTF-8") from None


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def check_depth(value: Any) -> None:
    """Refuse what is nested so deeply that code which follows it down could run out of stack."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [item for one in inner for item in one if isinstance(item, (dict, list))]
        if not level:
            return
    raise HTTPException(400, TOO_DEEP)


def refuse_constant(name: str) -> NoReturn:
    raise HTTPException(400, f"the body holds {name}, which is not JSON: numbers must be finite")


MAX_DEPTH = 100
TOO_DEEP = f"the body is nested more than {MAX_DEPTH} levels deep"
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field is impossible; the message names it."},
    503: {"description": "Not ready, shutting down, or too many requests wait."},
}


def show(status: int, body: Json) -> JsonResponse:
    return JsonResponse(body, status, {"Retry-After": "1"} if status == 503 else {})


async def show_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, NanoVLLMError)
    return show(*error_reply(error))


async def show_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    param = "model" if isinstance(error, UnknownModelError) else None
    status = error.status_code
    return show(status, error_body(str(error.detail), error_type(status), param, status))


async def show_invalid_body(_: Request, error: Exception) -> Response:
    """The first of the problems that pydantic found."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        return show(*error_reply(cause))
    message, where = f"the body is no JSON: {first.get('ctx', {}).get('error')}", ""
    if first["type"] != "json_invalid":
        where = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
        message = f"{where or 'body'}: {first['msg']}"
    return show(400, error_body(message, error_type(400), where or None, 400))
