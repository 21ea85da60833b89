"""The `openai` package of Python: completions, chat, models and errors."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests.clients.conftest import KEY, until_idle
from tests.server.servers import LIMIT_S, Served

MODEL = "smollm2-135m"
PROMPT, PROMPT_IDS = "The capital of France is", [504, 3575, 282, 4649, 314]
PARIS, DOT, END = 7042, 30, 2  # tokens
QUESTION = "What is the capital of France? Answer in one sentence."
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUESTION}]
ANSWER = "The capital of France is Paris."
ANSWER_TOKENS = ["The", " capital", " of", " France", " is", " Paris", ".", "<|im_end|>"]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=LIMIT_S) as client:
        yield client


def chat(client: OpenAI, **fields: Any) -> ChatCompletion:
    """The greedy answer to the question, changed by `fields`."""
    asked = {"messages": MESSAGES, "temperature": 0, "max_completion_tokens": 24, **fields}
    answer: ChatCompletion = client.chat.completions.create(model=MODEL, **asked)
    return answer


def text(client: OpenAI, **fields: Any) -> str | None:
    return chat(client, **fields).choices[0].message.content


# Models


def test_models(client: OpenAI) -> None:
    [model] = client.models.list()
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL) == model


# Completions


def test_a_completion(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=2, temperature=0)
    assert answer.object == "text_completion"
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (" Paris.", "length", None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 2)
    assert answer.usage.total_tokens == 7


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PROMPT_IDS, [" Paris."]),
        ([PROMPT, "The capital of Italy is"], [" Paris.", " Rome."]),
        ([PROMPT_IDS, [*PROMPT_IDS, PARIS]], [" Paris.", ".\n"]),
    ],
    ids=["token ids", "texts", "lists of token ids"],
)
def test_prompts_of_every_kind(client: OpenAI, prompt: Any, expected: list[str]) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, temperature=0)
    assert [choice.text for choice in answer.choices] == expected


def test_choices_are_numbered_over_prompts_and_samples(client: OpenAI) -> None:
    prompts = [PROMPT, "The capital of Italy is"]
    settings: dict[str, Any] = {"n": 2, "max_tokens": 2, "temperature": 0}
    answer = client.completions.create(model=MODEL, prompt=prompts, **settings)
    expected = [(0, " Paris."), (1, " Paris."), (2, " Rome."), (3, " Rome.")]
    assert [(choice.index, choice.text) for choice in answer.choices] == expected
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(model=MODEL, prompt=prompts, stream=True, **settings):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.items()) == expected


def test_echo_and_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=2, temperature=0, echo=True, logprobs=1
    )
    [choice] = answer.choices
    assert choice.text == PROMPT + " Paris."
    shown = choice.logprobs
    assert shown is not None and shown.top_logprobs is not None
    assert shown.tokens == ["The", " capital", " of", " France", " is", " Paris", "."]
    assert shown.text_offset == [0, 3, 11, 14, 21, 24, 30]
    first, *others = shown.token_logprobs or []
    assert first is None and all(logprob < 0 for logprob in others)
    # the likeliest, and the token itself if it is another
    assert [set(top or ()) for top in shown.top_logprobs[2:]] == [
        {" of"}, {" the", " France"}, {" is"}, {" Paris"}, {"."},
    ]  # fmt: skip
    for token, logprob, top in zip(shown.tokens[1:], others, shown.top_logprobs[1:], strict=True):
        assert top[token] == logprob


ECHO: dict[str, Any] = {"model": MODEL, "echo": True, "max_tokens": 0}  # as harnesses score texts


def test_echo_alone_scores_a_prompt(client: OpenAI) -> None:
    answer = client.completions.create(prompt=PROMPT, logprobs=1, **ECHO)
    longer = client.completions.create(prompt=PROMPT, logprobs=1, **{**ECHO, "max_tokens": 1})
    [choice], [more] = answer.choices, longer.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    shown, known = choice.logprobs, more.logprobs
    assert shown is not None and shown.token_logprobs is not None and known is not None
    assert shown.tokens == ["The", " capital", " of", " France", " is"]
    assert shown.text_offset == [0, 3, 11, 14, 21]
    assert shown.token_logprobs[0] is None and None not in shown.token_logprobs[1:]
    assert shown.token_logprobs == (known.token_logprobs or [])[:-1]
    assert shown.top_logprobs == (known.top_logprobs or [])[:-1]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 0)
    assert answer.usage.total_tokens == 5


@pytest.mark.parametrize("prompt", [["Paris", PROMPT], [[PARIS], PROMPT_IDS]], ids=["text", "ids"])
def test_echo_alone_scores_a_batch(client: OpenAI, prompt: Any) -> None:
    [alone] = client.completions.create(prompt=PROMPT, logprobs=1, **ECHO).choices
    answer = client.completions.create(prompt=prompt, logprobs=1, n=2, **ECHO)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices[2:]:
        assert (choice.text, choice.logprobs) == (PROMPT, alone.logprobs)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 0)


def test_echo_alone_streams_and_needs_no_logprobs(client: OpenAI) -> None:
    options = {"include_usage": True}
    for logprobs in (None, 1):
        [whole] = client.completions.create(prompt=PROMPT, logprobs=logprobs, **ECHO).choices
        chunk, last = client.completions.create(
            prompt=PROMPT, logprobs=logprobs, stream=True, stream_options=options, **ECHO
        )
        assert chunk.choices == [whole]
        assert last.usage is not None and last.usage.completion_tokens == 0


def test_no_tokens_without_echo_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(prompt=PROMPT, model=MODEL, max_tokens=0)
    assert refused.value.param == "max_tokens"


def test_logprobs_0_are_those_of_the_tokens(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=2, temperature=0, logprobs=0
    )
    shown = answer.choices[0].logprobs
    assert shown is not None and shown.token_logprobs is not None
    assert shown.top_logprobs == [
        {" Paris": shown.token_logprobs[0]}, {".": shown.token_logprobs[1]}
    ]  # fmt: skip


def test_a_streamed_completion(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPT,
        temperature=0,
        stop=["."],
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == " Paris"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (5, 2)


# Chat


def test_an_answer(client: OpenAI) -> None:
    answer = chat(client)
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWER)
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", [])
    assert answer.usage is not None and answer.usage.completion_tokens == len(ANSWER_TOKENS)


def test_a_streamed_answer(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == ANSWER
    finishes = [chunk.choices[0].finish_reason for chunk in chunks]
    assert finishes == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.object for chunk in [*chunks, last]} == {"chat.completion.chunk"}
    assert last.choices == []
    assert last.usage is not None and last.usage.completion_tokens == len(ANSWER_TOKENS)
    assert all(chunk.usage is None for chunk in chunks)


def test_the_streaming_helper_collects_the_same_answer(client: OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0}
    settings |= {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 24}
    with client.chat.completions.stream(**settings) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        answer = stream.get_final_completion()
    assert "".join(pieces) == ANSWER
    whole = client.chat.completions.create(**settings)
    assert answer.choices[0].message.content == whole.choices[0].message.content
    assert answer.choices[0].finish_reason == whole.choices[0].finish_reason
    shown = [answer.choices[0].logprobs, whole.choices[0].logprobs]
    tokens = [[one.token for one in part.content or ()] for part in shown if part]
    assert tokens == [ANSWER_TOKENS] * 2


def test_logprobs_of_an_answer(client: OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert [position.token for position in choice.logprobs.content] == ANSWER_TOKENS
    for position in choice.logprobs.content:
        assert bytes(position.bytes or ()).decode() == position.token
        assert len(position.top_logprobs) == 2
        assert position.top_logprobs[0].logprob == position.logprob  # greedy
        assert position.top_logprobs[0].logprob > position.top_logprobs[1].logprob


def test_samples_and_their_seed(client: OpenAI) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "n": 2, "seed": 7}
    chat(client)  # so that all that follow find the same in the prefix cache
    first, again = chat(client, **settings), chat(client, **settings)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1]
    assert texts[0] != texts[1]
    assert texts == [choice.message.content for choice in again.choices]
    streamed = {0: "", 1: ""}
    for chunk in client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=24, stream=True, **settings
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(streamed.values()) == texts


def test_the_conversation_may_hold_what_the_client_got(client: OpenAI) -> None:
    first = chat(client).choices[0].message
    more = {"role": "user", "content": [{"type": "text", "text": QUESTION}]}
    earlier = {"role": "developer", "content": "You are a helpful assistant."}
    answer = chat(client, messages=[earlier, *MESSAGES, first, more])
    assert answer.choices[0].message.content == ANSWER


def test_what_ends_an_answer(client: OpenAI) -> None:
    choice = chat(client, stop="Paris").choices[0]
    assert (choice.message.content, choice.finish_reason) == ("The capital of France is ", "stop")
    choice = chat(client, max_completion_tokens=2).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("The capital", "length")
    assert text(client, max_tokens=3, max_completion_tokens=2) == "The capital"


def test_logit_bias(client: OpenAI) -> None:
    answer = text(client, logit_bias={"504": -100})
    assert answer == "Paris, the City of Love, is the capital of France."


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"min_p": 1.0}])
def test_what_leaves_one_token(client: OpenAI, fields: dict[str, Any]) -> None:
    assert text(client, temperature=2.0, extra_body=fields) == ANSWER


def test_extras_of_vllm(client: OpenAI) -> None:
    def extra(**fields: Any) -> Any:
        [choice] = chat(client, extra_body=fields).choices
        return choice

    assert extra(allowed_token_ids=[PARIS, DOT]).message.content == " Paris." * 12
    stopped = extra(stop_token_ids=[PARIS])
    assert (stopped.message.content, stopped.stop_reason) == ("The capital of France is", PARIS)
    assert extra(repetition_penalty=2.0).message.content != ANSWER
    going_on = extra(ignore_eos=True)
    assert going_on.finish_reason == "length" and going_on.message.content.startswith(ANSWER)
    assert extra(min_tokens=20).message.content.startswith(ANSWER + " ")
    assert extra(priority=-3).message.content == ANSWER
    shown = extra(return_token_ids=True, prompt_logprobs=0)
    assert shown.token_ids[-3:] == [PARIS, DOT, END]
    assert shown.prompt_token_ids[:2] == [1, 9690]
    first, *others = shown.prompt_logprobs
    assert first is None
    expected = [[str(token_id)] for token_id in shown.prompt_token_ids[1:]]
    assert [list(entry) for entry in others] == expected


def test_a_salt_keeps_the_cache_to_those_who_know_it(client: OpenAI) -> None:
    def num_cached(salt: str) -> int | None:
        usage = chat(client, extra_body={"cache_salt": salt}).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    assert [num_cached(salt) for salt in ("first", "second", "first")] == [0, 0, 32]


def test_fields_that_ask_for_nothing_here_are_ignored(client: OpenAI) -> None:
    fields = {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert text(client, **fields, extra_body={"of_a_later_version": 1}) == ANSWER


def test_the_request_id(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, temperature=0, extra_headers={"X-Request-Id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse().choices[0].message.content == ANSWER
    own = chat(client)
    assert own._request_id is not None and len(own._request_id) == 32


# Errors


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": "2"}, "n"),
        ({"messages": []}, "messages"),
        ({"max_completion_tokens": 9000}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role"),
        ({"extra_body": {"min_p": 2}}, "min_p"),
        ({"extra_body": {"guided_json": {}}}, "guided_json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_named(
    client: OpenAI, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields, stream=stream)
    assert caught.value.param == param
    assert caught.value.type == "BadRequestError"
    assert param.partition("[")[0] in caught.value.message


def test_an_unknown_model(client: OpenAI) -> None:
    calls: list[Callable[[], object]] = [
        lambda: client.models.retrieve("gpt-4"),
        lambda: client.completions.create(model="gpt-4", prompt=PROMPT),
        lambda: client.chat.completions.create(model="gpt-4", messages=MESSAGES, stream=True),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError, match="`gpt-4` does not exist") as caught:
            call()
        assert caught.value.param == "model"


def test_an_endpoint_that_is_not_here(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input=PROMPT)


def test_a_wrong_key(client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
        chat(client.with_options(api_key="another"))


# Many at once, and leaving


def test_streams_side_by_side_are_not_mixed_up(served: Served) -> None:
    async def count_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:

            async def count(start: int) -> str:
                stream = await client.completions.create(
                    model=MODEL,
                    prompt=counted(start, 8),
                    max_tokens=12,
                    temperature=0,
                    stream=True,
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(count(start) for start in range(10, 42)))

    assert asyncio.run(count_all()) == [" " + counted(start, 3) for start in range(18, 50)]


def counted(start: int, count: int) -> str:
    return " ".join(f"{number}," for number in range(start, start + count))


def test_the_asynchronous_client(served: Served) -> None:
    async def ask() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
            settings: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0}
            whole = await client.chat.completions.create(**settings)
            async with client.chat.completions.stream(**settings) as stream:
                final = await stream.get_final_completion()
            [model] = [model.id async for model in client.models.list()]
            return [whole.choices[0].message.content, final.choices[0].message.content, model]

    assert asyncio.run(ask()) == [ANSWER, ANSWER, MODEL]


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_a_stream_aborts_its_request(client: OpenAI, served: Served, how: str) -> None:
    aborted = served.metric("request_success_total", finished_reason="abort")
    settings: dict[str, Any] = {"model": MODEL, "max_tokens": 8000, "stream": True}
    settings |= {"prompt": PROMPT, "extra_body": {"ignore_eos": True}}

    async def leave() -> None:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY) as client:
            got = asyncio.Event()

            async def read() -> None:
                async for _ in await client.completions.create(**settings):
                    got.set()

            reading = asyncio.create_task(read())
            await got.wait()
            reading.cancel()

    if how == "close":
        with client.completions.create(**settings) as stream:
            next(stream)
    else:
        asyncio.run(leave())
    until_idle(served)
    assert served.metric("request_success_total", finished_reason="abort") == aborted + 1
