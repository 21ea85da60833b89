"""The life of a server: a socket, then a model, then requests, then an orderly end.

loading ──▶ ready ──▶ draining ──▶ ended
  503        200        503          status 0
              └──▶ the engine died: 503, status 1
"""

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import uvicorn

from nanovllm.async_llm import AsyncLLM
from nanovllm.config import DEFAULT_MODEL
from nanovllm.errors import ConfigError, InvalidRequestError, ModelLoadError, NanoVLLMError
from nanovllm.models.checkpoint import locate
from nanovllm.models.config import read_json
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.app import build_app
from nanovllm.server.config import ServerConfig
from nanovllm.server.control_tokens import ControlTokens
from nanovllm.server.guard import ServerState
from nanovllm.server.http import LimitedProtocol
from nanovllm.server.metrics import Metrics
from nanovllm.server.replicas.front import Replicas
from nanovllm.server.service import Engine, Service
from nanovllm.server.templates import Templates

T = TypeVar("T")
BACKLOG = 2048  # connections that wait to be accepted
SPARE_FILES = 128  # descriptors that are not for connections
ADVISED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Server(uvicorn.Server):
    """A server that goes on answering while it drains. The first signal sets `stopping`, the
    second ends it at once."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.loop, self.stopping = asyncio.get_running_loop(), asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.stopping.is_set():
            self.should_exit = self.force_exit = True
        self.loop.call_soon_threadsafe(self.stopping.set)


async def serve(config: ServerConfig, settings: Mapping[str, Any], listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; then let the requests under way end.

    Args:
        settings: of the engine; see EngineConfig.
        listener: see `listen`.

    Raises:
        NanoVLLMError: the model cannot be loaded, or the engine died.
    """
    started_s, state = time.perf_counter(), ServerState()
    model = str(settings.get("model", DEFAULT_MODEL))
    service = Service(config, list(config.served_model_name) or [model], state)
    server = Server(
        uvicorn.Config(
            build_app(service),
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            limit_concurrency=raise_file_limit() - SPARE_FILES,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=1,
        )
    )
    serving = asyncio.create_task(server.serve([listener]))
    stopped = asyncio.create_task(server.stopping.wait())
    await asyncio.sleep(0)  # it handles signals from here on
    host, port = listener.getsockname()[:2]
    say(f"http://{f'[{host}]' if ':' in host else host}:{port} loads {model}")
    try:
        loading = asyncio.create_task(load(service, settings))
        await first(loading, stopped)
        if not loading.done():
            return
        service.loaded, state.ready = loading.result(), True
        say(f"ready after {time.perf_counter() - started_s:.1f} s")
        ended = asyncio.wrap_future(service.loaded.llm.ended)
        await first(ended, stopped)
        if ended.done():
            state.dead = str(ended.result())
            raise ended.result()
        state.draining = True
        say(
            f"ends; waits for {state.num_in_flight} requests, {config.shutdown_timeout:g} s at most"
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(config.shutdown_timeout):
                await state.idle.wait()
    finally:
        stopped.cancel()
        server.should_exit = True
        await serving
        if service.loaded is not None:
            await service.loaded.templates.close()
            service.loaded.llm.close()


async def load(service: Service, settings: Mapping[str, Any]) -> Engine:
    """Load the model, while the server answers that it does."""
    config, name = service.config, service.model_names[0]
    llm = await in_daemon(lambda: start(config, settings, name))
    tokenizer = llm.engine.tokenizer
    metrics = llm.observer if isinstance(llm, AsyncLLM) else llm
    assert tokenizer is not None and isinstance(metrics, Metrics | Replicas)
    templates = Templates(tokenizer.config)
    own = tokenizer.config.get("chat_template")
    if isinstance(own, list):  # several, by name
        own = next((entry["template"] for entry in own if entry["name"] == "default"), None)
    template = read_template(config.chat_template) or own
    with suppress(NanoVLLMError):  # starts the child; a template that fails is a request's affair
        await templates.render([{"role": "user", "content": ""}], chat_template=template)
    defaults = sampling_defaults(llm.config.model) if config.generation_config == "auto" else {}
    return Engine(llm, metrics, templates, ControlTokens(tokenizer), template, defaults)


def start(config: ServerConfig, settings: Mapping[str, Any], name: str) -> AsyncLLM | Replicas:
    """One engine in this process, or several elsewhere."""
    most = config.max_num_queued_reqs
    if config.data_parallel_size > 1:
        return Replicas(settings, name, config.data_parallel_size, most)
    return AsyncLLM(
        **settings,
        max_num_queued_reqs=most,
        observe=lambda engine: Metrics(name, engine.core),
    )


def sampling_defaults(model: str) -> dict[str, Any]:
    """The sampling parameters that a model's makers recommend.

    Raises:
        ModelLoadError: one is impossible.
    """
    file = locate(model) / "generation_config.json"
    advice = read_json(file) if file.exists() else {}
    defaults = {name: advice[name] for name in ADVISED if advice.get(name) is not None}
    if advice.get("do_sample") is False:
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        raise ModelLoadError(f"{file}: {error}") from error
    return defaults


def read_template(given: str | None) -> str | None:
    """The template that a flag names or holds."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("chat_template", given, f"cannot be read ({error})") from error


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port that is taken is found before a model is loaded. Bound
    only, two could have one.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    if os.name == "posix":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        name, value = ("host", host) if isinstance(error, socket.gaierror) else ("port", port)
        why = f"cannot listen there ({error}); --port 0 takes a free port"
        raise ConfigError(name, value, why) from error
    return listener


def raise_file_limit() -> int:
    """Let this process have all the descriptors it may have; returns how many."""
    try:
        import resource
    except ImportError:  # not on this system
        return 8192
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return min(soft, 2**20) if soft != resource.RLIM_INFINITY else 2**20


async def first(*awaited: "asyncio.Future[Any]") -> None:
    """Return when one of these is done."""
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)


async def in_daemon(function: Callable[[], T]) -> T:
    """Call a function in a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def call() -> None:
        try:
            value = function()
        except BaseException as error:
            loop.call_soon_threadsafe(result.set_exception, error)
        else:
            loop.call_soon_threadsafe(result.set_result, value)

    threading.Thread(target=call, daemon=True).start()
    return await result


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine on the fastest event loop that there is."""
    factory = None
    with suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


def say(text: str) -> None:
    print(f"nanovllm serve: {text}", file=sys.stdout, flush=True)
