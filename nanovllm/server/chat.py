"""/v1/chat/completions."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from nanovllm.errors import InvalidRequestError
from nanovllm.outputs import Logprobs, RequestOutput
from nanovllm.server.completions import LEAST, show_prompt_logprobs
from nanovllm.server.protocol import ChatCompletionRequest
from nanovllm.server.respond import Job, Json, new_id
from nanovllm.server.service import Service
from nanovllm.server.tool_parsers import Delta, ToolParser, collect, detect_parser, make_parser
from nanovllm.server.tools import check_tools
from nanovllm.structured_outputs import StructuredOutputsParams


class ChatForm:
    """Answers as OpenAI shows them.

    Args:
        new_parser: makes what finds the tool calls in a choice's text; None: it is all content.
        calls_finish: a choice with tool calls has finish_reason "tool_calls".
    """

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        body: ChatCompletionRequest,
        new_parser: Callable[[], ToolParser] | None,
        *,
        calls_finish: bool,
    ) -> None:
        self.body, self.new_parser, self.calls_finish = body, new_parser, calls_finish
        self.parsers: dict[int, ToolParser] = {}  # of each choice that streams
        self.began: set[int] = set()
        self.called: set[int] = set()  # choices with tool calls

    def chunks(self, choice: int, output: RequestOutput) -> list[Json]:
        shown = []
        for sample in output.outputs:
            index, finish = choice + sample.index, sample.finish_reason
            extra: Json = {}
            if self.body.logprobs:
                extra["logprobs"] = self.logprobs(sample.logprobs or ())
            if self.body.return_token_ids:
                extra["token_ids"] = sample.token_ids
            if index not in self.began:
                self.began.add(index)
                first: Json = {"role": "assistant", "content": ""}
                shown.append({"index": index, "delta": first, "finish_reason": None})
                if self.body.prompt_logprobs is not None:
                    shown[-1]["prompt_logprobs"] = show_prompt_logprobs(output)
            deltas = self.parse(index, sample.text, ended=finish is not None)
            for delta in deltas or ([{}] if extra or finish else []):
                one = {"index": index, "delta": delta, "finish_reason": None, **extra}
                shown.append(one)
                extra = {}
            if finish:
                shown[-1]["finish_reason"] = self.finish_reason(index in self.called, finish)
                shown[-1]["stop_reason"] = sample.stop_reason
        return shown

    def parse(self, index: int, text: str, *, ended: bool) -> list[Json]:
        """New text of a choice as OpenAI's deltas."""
        if self.new_parser is None:
            return [{"content": text}] if text else []
        parser = self.parsers.setdefault(index, self.new_parser())
        found = parser.push(text) + (parser.finish() if ended else [])
        deltas = [show_delta(delta) for delta in found]
        if any("tool_calls" in delta for delta in deltas):
            self.called.add(index)
        return deltas

    def choices(self, choice: int, output: RequestOutput) -> list[Json]:
        shown = []
        for sample in output.outputs:
            content: str | None = sample.text
            message: Json = {"role": "assistant", "refusal": None, "tool_calls": []}
            if self.new_parser is not None:
                parser = self.new_parser()
                content, calls = collect(parser.push(sample.text) + parser.finish())
                message["tool_calls"] = [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": call.arguments},
                    }
                    for call in calls
                ]
            finish = self.finish_reason(bool(message["tool_calls"]), sample.finish_reason or "")
            one: Json = {
                "index": choice + sample.index,
                "message": {"content": content, **message},
                "logprobs": self.logprobs(sample.logprobs or ()) if self.body.logprobs else None,
                "finish_reason": finish,
                "stop_reason": sample.stop_reason,
            }
            if self.body.prompt_logprobs is not None:
                one["prompt_logprobs"] = show_prompt_logprobs(output)
            if self.body.return_token_ids:
                one |= {"token_ids": sample.token_ids, "prompt_token_ids": output.prompt_token_ids}
            shown.append(one)
        return shown

    def finish_reason(self, called: bool, reason: str) -> str:
        return "tool_calls" if called and self.calls_finish and reason == "stop" else reason

    def logprobs(self, entries: Iterable[Logprobs]) -> Json:
        """OpenAI's form: the token and the likeliest, each with its text and bytes."""
        return {"content": [self.position(entry) for entry in entries]}

    def position(self, entry: Logprobs) -> Json:
        sampled, *_ = shown = [
            {"token": name, "logprob": max(p.logprob, LEAST), "bytes": list(text.encode())}
            for token_id, p in entry.items()
            for text in [p.decoded_token or ""]
            for name in [f"token_id:{token_id}" if self.body.return_tokens_as_token_ids else text]
        ]
        count = self.body.top_logprobs or 0
        top = [one for one, p in zip(shown, entry.values(), strict=True) if p.rank <= count]
        top.sort(key=lambda one: -float(one["logprob"]))  # type: ignore[arg-type]
        return {**sampled, "top_logprobs": top}


def show_delta(delta: Delta) -> Json:
    """A piece of content or of a tool call as OpenAI's delta."""
    if delta.index is None:
        return {"content": delta.text}
    call: Json = {"index": delta.index, "function": {"arguments": delta.text}}
    if delta.id:
        call |= {"id": delta.id, "type": "function"}
        call["function"] = {"name": delta.name, "arguments": delta.text}
    return {"tool_calls": [call]}


async def chat_job(service: Service, body: ChatCompletionRequest) -> Job:
    """The request of a body, checked, rendered and tokenized.

    Raises:
        InvalidRequestError: it is impossible; nothing was queued.
        TemplateError: the chat template failed.
    """
    engine, model = service.engine, service.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs", body.top_logprobs, "needs logprobs=true")
    service.check_logprobs(top_logprobs=body.top_logprobs, prompt_logprobs=body.prompt_logprobs)
    if body.chat_template is not None and not service.config.trust_request_chat_template:
        why = "a client's own template is refused (the server's --trust-request-chat-template)"
        raise InvalidRequestError("chat_template", body.chat_template, why)
    choice, parallel = (
        check_tools(body.tools, body.tool_choice),
        body.parallel_tool_calls is not False,
    )
    schema = choice.schema(parallel_tool_calls=parallel)
    max_tokens, limit = body.max_completion_tokens, "max_completion_tokens"
    if max_tokens is None:
        max_tokens, limit = body.max_tokens, "max_tokens"
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    form = None if schema is None else StructuredOutputsParams(json=schema)
    if form and body.output_form():
        why = "sets the form of the answer; leave out response_format and structured_outputs"
        raise InvalidRequestError("tool_choice", body.tool_choice, why)
    params = body.sampling_params(
        engine.defaults, max_tokens=max_tokens, logprobs=logprobs, form=form
    )
    if choice.mode == "auto":  # the tags of a call may be special tokens
        params = replace(params, skip_special_tokens=False)
    text, token_ids = await engine.render(
        body.messages,
        tools=() if choice.mode == "none" else choice.tools,
        chat_template=body.chat_template,
        add_generation_prompt=body.add_generation_prompt,
        add_special_tokens=body.add_special_tokens,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    fields = body.prompt_fields() | {"prompt": text, "prompt_token_ids": token_ids}
    request = await engine.llm.prepare(fields, params, body.priority)
    service.check_room(limit, len(token_ids), max_tokens)
    name = service.config.tool_call_parser
    if name == "auto":
        name = detect_parser(body.chat_template or engine.chat_template)
    new_parser = None
    if choice.mode != "none":
        new_parser = partial(make_parser, choice, name, parallel_tool_calls=parallel)
    chat_form = ChatForm(body, new_parser, calls_finish=choice.mode != "named")
    return Job(engine.llm, [request], chat_form, model, new_id("chatcmpl"))
