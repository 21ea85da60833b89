"""/v1/completions."""

from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Items
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from nanovllm.outputs import CompletionOutput, Logprobs, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.protocol import CompletionRequest
from nanovllm.server.respond import Job, Json, new_id
from nanovllm.server.service import Service

LEAST = -9999.0  # JSON has no infinity; as in vLLM


class CompletionForm:
    """Completions as OpenAI shows them.

    Args:
        decode: text of token ids.
        echo: of each request's prompt the text to begin with; None shows no prompt.
    """

    kind = chunk_kind = "text_completion"

    def __init__(
        self, body: CompletionRequest, decode: Callable[[list[int]], str], echo: Items[str] | None
    ) -> None:
        self.body, self.decode, self.echo = body, decode, echo
        self.num_chars: dict[int, int] = {}  # shown of each choice

    def chunks(self, choice: int, output: RequestOutput) -> list[Json]:
        shown = []
        for sample in output.outputs:
            begins = choice + sample.index not in self.num_chars
            one = self.choice(choice, output, sample, begins=begins)
            if one["text"] or sample.finish_reason or self.body.return_token_ids or one["logprobs"]:
                shown.append(one)
        return shown

    def choices(self, choice: int, output: RequestOutput) -> list[Json]:
        return [self.choice(choice, output, sample, begins=True) for sample in output.outputs]

    def choice(
        self, first: int, output: RequestOutput, sample: CompletionOutput, *, begins: bool
    ) -> Json:
        index, n = first + sample.index, self.body.n or 1
        text, logprobs = sample.text, list(sample.logprobs or ())
        known: list[Logprobs | None] = [*logprobs]
        ids = list(sample.token_ids)
        if begins and self.echo is not None:
            text = self.echo[first // n] + text
            known = [*(output.prompt_logprobs or ()), *known]
            ids = [*output.prompt_token_ids, *ids]
        start = self.num_chars.get(index, 0)
        self.num_chars[index] = start + len(text)
        asked = self.body.logprobs
        one: Json = {
            "index": index,
            "text": text,
            "logprobs": None if asked is None else self.logprobs(ids, known, start),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if self.body.prompt_logprobs is not None and begins:
            one["prompt_logprobs"] = show_prompt_logprobs(output)
        if self.body.return_token_ids:
            one["token_ids"] = sample.token_ids
            one["prompt_token_ids"] = output.prompt_token_ids if begins else None
        return one

    def logprobs(self, token_ids: list[int], entries: list[Logprobs | None], start: int) -> Json:
        """OpenAI's four lists, an entry for each token.

        Args:
            start: characters of the choice before the first of these tokens.
        """
        shown: Json = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        as_ids = bool(self.body.return_tokens_as_token_ids)
        for token_id, entry in zip(token_ids, entries, strict=True):
            known = entry or {}
            found = known.get(token_id)
            text = (found and found.decoded_token) or self.decode([token_id])
            most = self.body.logprobs or 0
            top = [i for i, p in known.items() if p.rank <= most or i == token_id]
            names = {i: f"token_id:{i}" if as_ids else known[i].decoded_token for i in known}
            shown["text_offset"].append(start)
            shown["token_logprobs"].append(max(found.logprob, LEAST) if found else None)
            shown["tokens"].append(names.get(token_id, f"token_id:{token_id}" if as_ids else text))
            shown["top_logprobs"].append(
                {names[i]: max(known[i].logprob, LEAST) for i in top} if entry else None
            )
            start += len(text)
        return shown


class EchoJob(Job):
    """Prompts and nothing after them; the engine samples a token, which is not shown."""

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput]]:
        async with aclosing(super().outputs()) as outputs:
            async for index, output in outputs:
                samples = [replace(one, text="", token_ids=[]) for one in output.outputs]
                yield index, replace(output, outputs=samples)


def show_prompt_logprobs(output: RequestOutput) -> list[Any]:
    """vLLM's form: for each prompt token a dictionary by token id; None for the first."""
    return [
        entry
        and {
            str(token_id): {
                "logprob": max(p.logprob, LEAST),
                "rank": p.rank,
                "decoded_token": p.decoded_token,
            }
            for token_id, p in entry.items()
        }
        for entry in output.prompt_logprobs or ()
    ]


async def completion_job(service: Service, body: CompletionRequest) -> Job:
    """The requests of a body, checked and tokenized.

    Raises:
        InvalidRequestError: one is impossible; nothing was queued.
    """
    engine, model = service.engine, service.check_model(body.model)
    service.check_logprobs(logprobs=body.logprobs, prompt_logprobs=body.prompt_logprobs)
    echo_alone = bool(body.echo) and body.max_tokens == 0
    most = 1 if echo_alone else body.max_tokens
    params = body.sampling_params(engine.defaults, max_tokens=most, logprobs=body.logprobs)
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        params = replace(params, prompt_logprobs=body.logprobs)
    if echo_alone:  # no rule of sampling matters
        params = SamplingParams(
            n=params.n,
            temperature=0,
            max_tokens=1,
            ignore_eos=True,
            prompt_logprobs=params.prompt_logprobs,
            output_kind=params.output_kind,
        )
    several = isinstance(body.prompt, list) and not all(type(item) is int for item in body.prompt)
    requests = []
    for prompt in body.prompt if several else [body.prompt]:
        fields = body.prompt_fields() | {"prompt_token_ids": prompt}
        if isinstance(prompt, str):
            ids = await engine.encode(prompt, add_special_tokens=body.add_special_tokens)
            fields |= {"prompt": prompt, "prompt_token_ids": ids}
        requests.append(await engine.llm.prepare(fields, params, body.priority))
        service.check_room("max_tokens", len(requests[-1].prompt_token_ids), body.max_tokens)
    echo = None
    if body.echo:
        echo = [r.prompt or engine.decode(r.prompt_token_ids) for r in requests]
    form = CompletionForm(body, engine.decode, echo)
    kind = EchoJob if echo_alone else Job
    return kind(engine.llm, requests, form, model, new_id("cmpl"))
