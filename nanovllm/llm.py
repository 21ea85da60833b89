"""LLM: the parts put together, for use from Python."""

from collections.abc import Callable, Generator, Iterator, Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, Self, cast

from tqdm import tqdm

from nanovllm.checks import spread
from nanovllm.config import DEFAULT_MODEL, EngineConfig
from nanovllm.core.block_manager import BlockManager
from nanovllm.core.engine import EngineCore
from nanovllm.core.policy import make_policy
from nanovllm.core.scheduler import Scheduler
from nanovllm.errors import EngineDeadError, InvalidRequestError
from nanovllm.executor.inline import InlineExecutor
from nanovllm.models.checkpoint import locate, read_config
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.text_engine import Prompt, Request, TextEngine
from nanovllm.tokenizer import Tokenizer

Params = SamplingParams | Items[SamplingParams] | None


def build(
    config: EngineConfig, died: Callable[[EngineDeadError], None] = lambda error: None
) -> TextEngine:
    """Load the model and put an engine together around it.

    Args:
        died: called, in any thread, if processes that the engine needs are lost.

    Raises:
        ModelLoadError: the checkpoint cannot be had or is damaged.
        ConfigError: a setting does not go with this model or machine, or config.record cannot be
            written.
    """
    path = locate(config.model)
    model = read_config(path)
    config = config.for_model(model.max_model_len)
    assert config.max_num_seqs and config.max_num_batched_tokens and config.max_model_len
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = Tokenizer(locate(config.tokenizer) if config.tokenizer else path)
    policy = make_policy(config.scheduling_policy)
    if config.tensor_parallel_size == 1 and config.distributed_executor_backend == "mp":
        executor: Any = InlineExecutor(config, model, path)
    else:
        from nanovllm.executor.several import make_executor

        executor = make_executor(config, model, path, died)
    caching, evict = config.enable_prefix_caching, policy.evict
    blocks = BlockManager(executor.num_blocks, config.block_size, caching, evict)
    limits = config.max_num_seqs, config.max_num_batched_tokens, config.enable_chunked_prefill
    scheduler = Scheduler(blocks, policy, *limits)
    length, ends = config.max_model_len, model.eos_token_ids
    kind: type[EngineCore] = EngineCore
    if config.async_scheduling or (config.async_scheduling is None and executor.device == "cuda"):
        from nanovllm.core.ahead import AheadEngine

        kind = AheadEngine
    core = kind(scheduler, executor, length, ends, config.seed)
    if config.record is not None:
        from nanovllm.recording import Recorder

        Recorder(core, config.record, config, config.record_max_bytes)
    return TextEngine(core, tokenizer, model.vocab_size)


class LLM:
    """An engine to call from Python; vLLM's class of that name, as far as it is here.

        with LLM("smollm2-135m") as llm:
            print(llm.generate("The capital of France is")[0].outputs[0].text)

    Args:
        model, settings: see EngineConfig.

    Raises:
        ConfigError, ModelLoadError, MissingDependencyError: see `build`.
    """

    def __init__(self, model: str | Path = DEFAULT_MODEL, **settings: Any) -> None:
        self.config = EngineConfig.make(model=str(model), **settings)
        self._engine: TextEngine | None = build(self.config)

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        priority: Items[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all in one go.

        Args:
            prompts: a text, a list of token ids, {"prompt": text}, {"prompt_token_ids": ids}
                (with "cache_salt" if wanted), or a list of these.
            sampling_params: for all, or one for each. None: SamplingParams().
            priority: one for each; lower goes first under the priority policy.

        Returns:
            an output for each prompt, in their order. A request that failed alone has
            finish_reason "error".

        Raises:
            InvalidRequestError: a prompt or parameter is impossible; nothing was computed.
            EngineDeadError: the engine is closed.
        """
        requests = self._submit(as_list(prompts), sampling_params, priority)
        for _ in self._run(requests, use_tqdm):
            pass
        return [self.engine.output(request) for request in requests]

    def chat(
        self,
        messages: Items[Any],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or a list of conversations: `generate` on rendered prompts.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            template: chat_template, add_generation_prompt, chat_template_kwargs; see
                chat.chat_prompts.
        """
        from nanovllm.chat import chat_prompts

        prompts = chat_prompts(self.get_tokenizer(), messages, **template)
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[RequestOutput]:
        """Complete one prompt, and show how far it is after each step. Ending the iteration
        early aborts the request."""
        for request in self._run(self._submit([prompt], params, None), use_tqdm=False):
            yield self.engine.output(request, partial=True)

    def get_tokenizer(self) -> Tokenizer:
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("skip_tokenizer_init", True, "there is no tokenizer")
        return tokenizer

    def get_metrics(self) -> dict[str, float]:
        """Counters and gauges of the engine under vLLM's names."""
        return self.engine.core.get_metrics()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes."""
        self.engine.core.scheduler.blocks.reset_prefix_cache()

    def close(self) -> None:
        """Give up the model and its memory; closing twice does nothing."""
        if self._engine is not None:
            self._engine.core.executor.close()
            self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> TextEngine:
        if self._engine is None:
            raise EngineDeadError("this LLM is closed; make a new one")
        return self._engine

    def _submit(
        self, prompts: list[Prompt], params: Params, priority: Items[int] | None
    ) -> list[Request]:
        """Check all prompts, then queue all."""
        count, params = len(prompts), SamplingParams() if params is None else params
        each = spread("sampling_params", params, count)
        priorities = spread("priority", 0 if priority is None else priority, count)
        engine, parts = self.engine, zip(prompts, each, priorities, strict=True)
        return [engine.submit(request) for request in [engine.prepare(*part) for part in parts]]

    def _run(self, requests: list[Request], use_tqdm: bool) -> Iterator[Request]:
        """Step the engine until the requests are done; yield each as often as it advances."""
        engine, open_requests, num_tokens = self.engine, set(requests), 0
        bar = tqdm(total=len(requests), desc="Requests", disable=not use_tqdm)
        try:
            while open_requests:
                # one that finished while another caller stepped the engine is shown once more
                done = {request for request in open_requests if request.finished}
                advanced = [] if done else engine.step()
                for request in done or open_requests.intersection(r for r, _ in advanced):
                    if request.finished:
                        open_requests.remove(request)
                        bar.update()
                    yield request
                num_tokens += len(advanced)
                rate = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(f"{rate:.0f} output tok/s", refresh=False)
        finally:  # after Ctrl-C too, nothing is left behind
            bar.close()
            for request in open_requests:
                engine.abort(request)


def as_list(prompts: Prompt | Items[Prompt]) -> list[Prompt]:
    """A single prompt as a list of one; a list of ids is a single prompt."""
    if isinstance(prompts, (str, Mapping)) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Items[Prompt], prompts))
