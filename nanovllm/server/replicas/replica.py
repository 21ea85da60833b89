"""One engine of several: what Ray Serve starts, asks for its health and replaces."""

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from nanovllm.async_llm import AsyncLLM
from nanovllm.errors import EngineDeadError, NanoVLLMError, QueueFullError, RequestFailedError
from nanovllm.outputs import RequestOutput
from nanovllm.server.metrics import Metrics
from nanovllm.text_engine import Request

Told = tuple[type[NanoVLLMError], str]  # an error and what it says


class Replica:
    """An AsyncLLM in an actor of its own, which ends with it, so that the death of an engine is
    what Ray knows best: the death of a process.

    Args:
        settings: of AsyncLLM. model_name: label of the metrics.
    """

    def __init__(self, settings: dict[str, Any], model_name: str) -> None:
        from ray import serve

        number = self.number = str(serve.get_replica_context().rank.rank)
        self.llm = AsyncLLM(**settings, observe=lambda text: Metrics(model_name, text.core, number))
        self.llm.ended.add_done_callback(lambda _: os._exit(1))

    def check_health(self) -> None:
        """Raises where Serve is to replace this one."""
        self.llm.check_health()

    async def generate(
        self, hashes: list[bytes], request: Request
    ) -> AsyncGenerator[RequestOutput | Told | None]:
        """Run a prepared request; the first that comes is None, as soon as it is here.

        Args:
            hashes: of its prefixes, for the router.
        """
        yield None
        try:
            async with aclosing(self.llm.run(request)) as outputs:
                async for output in outputs:
                    yield output
        except (EngineDeadError, QueueFullError, RequestFailedError) as error:
            yield type(error), str(error)

    def shape(self) -> tuple[int, int, int]:
        """Tokens that a sequence may have, the block size and the vocabulary's."""
        core = self.llm.engine.core
        blocks = core.scheduler.blocks
        return core.max_num_tokens, blocks.block_size, self.llm.engine.vocab_size

    def process(self) -> tuple[str, int]:
        """This replica's number, and the process it is."""
        self.llm.check_health()
        return self.number, os.getpid()

    def metrics(self) -> bytes:
        assert isinstance(self.llm.observer, Metrics)
        return self.llm.observer.render()

    def reset_prefix_cache(self) -> None:
        self.llm.reset_prefix_cache()
