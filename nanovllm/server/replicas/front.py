"""What the server holds in place of an AsyncLLM where there are several engines.

front: checks, tokenizes, hashes ──▶ Ray Serve's handle, PrefixRouter ──▶ Replica, ...
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Event, Thread
from typing import Any, ParamSpec, TypeVar

from nanovllm.config import EngineConfig
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine import EngineCore
from nanovllm.core.policy import make_policy
from nanovllm.core.scheduler import Scheduler
from nanovllm.errors import ConfigError, EngineDeadError, MissingDependencyError, NanoVLLMError
from nanovllm.models.checkpoint import locate
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.replicas.index import prefix_hashes
from nanovllm.text_engine import Prompt, Request, TextEngine
from nanovllm.tokenizer import Tokenizer
from nanovllm.worker.threads import default_num_threads

P = ParamSpec("P")
T = TypeVar("T")
APP = "nanovllm"
NUM_TRIES = 4  # of a request of which nothing was shown
PLACE_S = 60.0  # for a replica to take a request, be it one that is being started
ANSWER_S = 5.0  # for a replica to say how it is
WATCH_S = 1.0  # between two looks at which replicas are there
RETRY_S = 0.1
ENVIRONMENT = {  # so that Ray calls nobody, leaves signals to the server and is silent at forks
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
    "GRPC_ENABLE_FORK_SUPPORT": "0",
}
logger = logging.getLogger("nanovllm.server")


class Replicas:
    """Engines behind Ray Serve, with what a server uses of AsyncLLM.

    Args:
        model_name: label of the metrics. size: how many.
        max_num_queued_reqs: samples that may wait at each.

    Attributes:
        processes: the process of each replica that is there, by its number.

    Raises:
        ConfigError, ModelLoadError: a setting is impossible, or the tokenizer is not there.
        MissingDependencyError, NanoVLLMError: Ray is not there, or a replica does not start.
    """

    def __init__(
        self, settings: Mapping[str, Any], model_name: str, size: int, max_num_queued_reqs: int
    ) -> None:
        self.config = EngineConfig.make(**settings)
        if self.config.distributed_executor_backend == "ray":
            why = "cannot be used with data_parallel_size: leave it out, or serve one engine"
            raise ConfigError("distributed_executor_backend", "ray", why)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            import ray  # noqa: F401
            from ray import serve  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError("ray[serve]", "ray", "data_parallel_size") from error
        tokenizer = Tokenizer(locate(self.config.tokenizer or self.config.model))
        self.ended: Future[EngineDeadError] = Future()
        self.dead: EngineDeadError | None = None
        self.processes: dict[str, int] = {}
        self._closed = Event()
        started: Future[tuple[int, int, int]] = Future()
        own = {**settings, "max_num_queued_reqs": max_num_queued_reqs}
        # Ray's processes die with the thread that started them (prctl's PR_SET_PDEATHSIG).
        keep = partial(self._keep, started, size, own, model_name)
        self._thread = Thread(target=keep, name="replicas", daemon=True)
        self._thread.start()
        max_num_tokens, self.block_size, vocab_size = started.result()
        blocks = BlockManager(-(-max_num_tokens // self.block_size), self.block_size)
        scheduler = Scheduler(blocks, make_policy("fcfs"), 1, max_num_tokens)
        executor: Any = None  # it accepts requests and runs none
        core = EngineCore(scheduler, executor, max_num_tokens)
        self.engine = TextEngine(core, tokenizer, vocab_size)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._compiling = ThreadPoolExecutor(2, "grammar")

    @property
    def problem(self) -> str | None:
        """Why requests have to wait now."""
        return None if self.processes else "no replica is there; another is being started"

    async def prepare(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, priority: int = 0
    ) -> Request:
        """See AsyncLLM.prepare."""
        params = sampling_params or SamplingParams()
        pool = self._tokenizing if params.structured_outputs is None else self._compiling
        return await self._in(pool, self.engine.prepare, prompt, params, priority)

    async def in_background(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """See AsyncLLM.in_background."""
        return await self._in(self._tokenizing, function, *args, **kwargs)

    async def _in(
        self, pool: ThreadPoolExecutor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        self.check_health()
        loop, call = asyncio.get_running_loop(), partial(function, *args, **kwargs)
        return await loop.run_in_executor(pool, call)

    async def run(self, request: Request, request_id: str = "") -> AsyncGenerator[RequestOutput]:
        """Run a prepared request at a replica; at another if that dies before anything came.

        Raises:
            EngineDeadError: the replica died after something had come, several did, or none is
                there for too long.
            QueueFullError, RequestFailedError: see AsyncLLM.run.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        self.check_health()
        hashes = prefix_hashes(request.prompt_token_ids, self.block_size, request.cache_salt)
        begun, finished, why = False, False, ""
        for _ in range(NUM_TRIES):
            response = self.handle.options(stream=True).generate.remote(hashes, request)
            try:
                async with asyncio.timeout(PLACE_S):
                    await anext(response)  # it is there
                async for output in response:
                    if isinstance(output, tuple):
                        kind, why = output
                        if kind is not EngineDeadError or begun:
                            raise kind(why)
                        break
                    begun, finished = True, output.finished
                    yield output
                if finished:
                    return
            except TimeoutError:
                why = f"no replica took the request within {PLACE_S:g} s: try again later"
                raise EngineDeadError(why) from None
            except (RayError, RayServeException) as error:
                why = f"a replica was lost ({type(error).__name__})"
                if begun:
                    raise EngineDeadError(f"{why} after a part of the answer") from error
            finally:
                if not finished:
                    response.cancel()
            await asyncio.sleep(RETRY_S)
        raise EngineDeadError(f"{NUM_TRIES} replicas failed: {why}")

    def check_health(self) -> None:
        """
        Raises:
            EngineDeadError: it is closed.
        """
        if self.dead is not None:
            raise self.dead.with_traceback(None)

    async def render(self) -> bytes:
        """The metrics of the replicas that are there, as text."""
        return merge_metrics(await asyncio.to_thread(self._everywhere, "metrics"))

    def reset_prefix_cache(self) -> None:
        """Let all replicas forget their prefixes, before requests that are yet to be prepared."""
        self._tokenizing.submit(self._everywhere, "reset_prefix_cache")

    def _everywhere(self, method: str) -> list[Any]:
        """What each replica says that is there and well."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        response = self.handle.broadcast(method)
        try:
            results = response.results(timeout_s=ANSWER_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):  # none is there
            return []
        return [result for result in results if not isinstance(result, Exception)]

    def close(self) -> None:
        """End the replicas; closing twice does nothing."""
        if self.dead is None:
            self.dead = EngineDeadError("the engine is closed; make a new one")
            self._closed.set()
            self._thread.join()
            self._tokenizing.shutdown()
            self._compiling.shutdown()
            self.ended.set_result(self.dead)

    # In a thread of its own

    def _keep(
        self, started: "Future[tuple[int, int, int]]", size: int, own: dict[str, Any], name: str
    ) -> None:
        """Start Ray and the replicas, note which are there, and log it when they are others."""
        import ray
        from ray import serve

        here = not ray.is_initialized()
        try:
            started.set_result(self._start(size, own, name))
        except Exception as error:
            self._closed.set()
            why = str(error).strip().rpartition("\n")[2]
            started.set_exception(NanoVLLMError(f"the replicas did not start: {why}"))
            logger.debug("the replicas did not start", exc_info=error)
        shown: dict[str, int] = {}
        while not self._closed.is_set():
            if self.processes != shown:
                shown = self.processes
                logger.info(json.dumps({"replicas": shown}))
            self._closed.wait(WATCH_S)
            self.processes = dict(sorted(self._everywhere("process")))
        if here:
            serve.shutdown()
            ray.shutdown()
        else:
            serve.delete(APP)

    def _start(self, size: int, own: dict[str, Any], name: str) -> tuple[int, int, int]:
        import ray
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        from nanovllm.server.replicas.replica import Replica
        from nanovllm.server.replicas.router import PrefixRouter

        num_ranks = self.config.tensor_parallel_size
        if not ray.is_initialized():  # on a machine with fewer cores than ranks, these share them
            cores = max(size * num_ranks, os.cpu_count() or 1)
            ray.init(
                num_cpus=None if os.environ.get("RAY_ADDRESS") else cores,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        on_gpu = ray.cluster_resources().get("GPU", 0) > 0 and self.config.device != "cpu"
        threads = str(max(1, default_num_threads() // size))
        serve.start(proxy_location="Disabled")
        make: Any = serve.deployment  # its overloads hide what it returns
        router: Any = PrefixRouter
        deployment = make(Replica).options(
            num_replicas=size,
            max_ongoing_requests=2**20,
            health_check_period_s=1,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=1,
            graceful_shutdown_wait_loop_s=0.1,
            request_router_config=RequestRouterConfig(request_router_class=router),
            ray_actor_options={
                "num_cpus": num_ranks,
                "num_gpus": num_ranks * on_gpu,
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}},
            },
        )
        self.handle: Any = serve.run(deployment.bind(own, name), name=APP, route_prefix=None)
        shape: tuple[int, int, int] = self.handle.shape.remote().result()
        self.processes = dict(sorted(self._everywhere("process")))
        return shape


def merge_metrics(texts: list[bytes]) -> bytes:
    """The series under vLLM's names of several expositions, each metric in one place."""
    families: dict[str, list[str]] = {}
    for text in texts:
        heads: list[str] = []
        for line in text.decode().splitlines():
            if line.startswith("# HELP"):
                heads = [line]
            elif line.startswith("#"):
                heads.append(line)
            elif line.startswith("vllm:"):
                families.setdefault(heads[0], heads[:]).append(line)
    return "".join(f"{line}\n" for lines in families.values() for line in lines).encode()
