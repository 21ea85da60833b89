"""Random requests, by seed: what is asked, how it is delivered, and whether the answer is right.

question ─▶ ask it alone ─▶ answer ──────────────────────┐
    └─────▶ ask it among others, delivered anyhow ─▶ compare
"""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.server.wire import DONE, Connection, CutError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LIMIT_S = 120.0  # for one answer
PREFIXES = [
    "",
    "The museum opens at nine. ",
    "The museum opens at nine. Visitors come from everywhere, and most are curious children. ",
    "1, 2, 3, 5, 8, 13, 21, 34, ",
]
WORDS = [
    *("why", "river", "seven", "Anna", "mirror", "1892", "blue?", "stone,", "tea;", "dome"),
    *("café", "né", "日本", "🎉", "\n\t", "{}", "<b>"),
]
STOPS = ["e", "a", "th", " the", "s ", "\n", "ing", "tion"]
FORMS: list[dict[str, Any]] = [
    {"structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
    {"structured_outputs": {"regex": "[a-c]{3,6}[0-9]"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1, "x"]}}}},
]
CROWDED = (  # flags of a server in which requests chunk, wait, evict and preempt
    "--dtype=float32",  # tokens do not depend on the batch
    "--scheduling-policy=priority",
    "--block-size=8",
    "--num-kv-blocks=32",
    "--max-model-len=256",
    "--max-num-batched-tokens=24",
    "--max-num-seqs=12",
)


@dataclass(frozen=True)
class Question:
    """A request for which there is one right answer: greedy, or with a seed."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Delivery:
    """What makes no difference to an answer.

    Attributes:
        extras: more fields of the body. leave_after: events after which the client leaves (-1:
            before the response), or None. pause_s: what a slow client waits between events.
    """

    extras: dict[str, Any]
    leave_after: int | None = None
    pause_s: float = 0.0

    @property
    def stream(self) -> bool:
        return bool(self.extras.get("stream"))


@dataclass
class Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    ends: list[Any] = field(default_factory=list)  # finish_reason and stop_reason, once


@dataclass
class Answer:
    """What came back.

    Attributes:
        whole: it came to its end. fault: what is wrong with its form.
    """

    status: int = 0
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    ids: set[str] = field(default_factory=set)
    error: dict[str, Any] | None = None
    whole: bool = False
    fault: str = ""

    def take(self, data: dict[str, Any]) -> None:
        """A whole response, or an event of one."""
        if "error" in data:
            self.error = data["error"]
            return
        self.ids.add(data["id"])
        if (usage := data.get("usage")) is not None:
            self.usage = usage["prompt_tokens"], usage["completion_tokens"]
        for one in data["choices"]:
            choice = self.choices.setdefault(one["index"], Choice())
            if choice.ends:
                self.fault = f"news of choice {one['index']} after its end"
            part = one.get("message") or one.get("delta") or {}
            choice.text += one.get("text") or part.get("content") or ""
            choice.token_ids += one.get("token_ids") or ()
            if one.get("finish_reason"):
                choice.ends += [one["finish_reason"], one.get("stop_reason")]


def questions(seed: int, longest: int = 24) -> Iterator[Question]:
    """Valid requests without end.

    Args:
        longest: tokens that an output has at most.
    """
    rng = Random(seed)

    def make_text() -> str:
        return rng.choice(PREFIXES) + " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    while True:
        body: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 3, 5, 8, longest // 2, longest])}
        body |= {"temperature": 0, "return_token_ids": True}
        if rng.random() < 0.25:
            # among few tokens, so that no rounding moves the draw to a neighbour
            body |= {"temperature": 0.8, "top_k": 8, "seed": rng.randrange(2**31)}
        if rng.random() < 0.3:
            body["n"] = rng.randint(2, 3)
        if rng.random() < 0.3:
            body["stop"] = rng.sample(STOPS, rng.randint(1, 3))
        if rng.random() < 0.3:
            body["ignore_eos"] = True
        if rng.random() < 0.15:
            body |= {"repetition_penalty": 1.2, "presence_penalty": 0.5}
        if rng.random() < 0.1:
            body |= rng.choice(FORMS)
        elif rng.random() < 0.15:  # a form may be complete before
            body["min_tokens"] = rng.randint(1, body["max_tokens"])
        if rng.random() < 0.3:
            turns = [{"role": "user", "content": make_text()}]
            if rng.random() < 0.3:
                turns += [{"role": "assistant", "content": "Yes."}, turns[0]]
            yield Question(CHAT, body | {"messages": turns})
        else:
            ids = [rng.randrange(5, 49_000) for _ in range(rng.randint(1, 40))]
            prompt = rng.choice([make_text(), make_text(), ids, [make_text(), make_text()]])
            yield Question(COMPLETIONS, body | {"prompt": prompt})


def deliveries(seed: int, leaving: float = 0.2, slow_s: float = 0.0) -> Iterator[Delivery]:
    """Ways to deliver a request, without end.

    Args:
        leaving: share of the clients that leave. slow_s: what some clients wait between events.
    """
    rng = Random(seed)
    while True:
        extras: dict[str, Any] = {}
        if rng.random() < 0.6:
            extras |= {"stream": True, "stream_options": {"include_usage": True}}
        if rng.random() < 0.5:
            extras["cache_salt"] = rng.choice(["a", "b"])
        if rng.random() < 0.5:
            extras["priority"] = rng.randint(-1, 2)
        leave_after = rng.randint(-1, 6) if rng.random() < leaving else None
        yield Delivery(extras, leave_after, slow_s if rng.random() < 0.1 else 0.0)


async def ask(url: str, question: Question, delivery: Delivery) -> Answer:
    """The answer to a question, as far as the client reads it."""
    answer = Answer()
    try:
        async with asyncio.timeout(LIMIT_S):
            connection = await Connection.open(url)
            try:
                connection.send(question.path, question.body | delivery.extras)
                await read(connection, delivery, answer)
            finally:
                connection.leave()
    except (CutError, OSError, TimeoutError) as error:
        answer.fault = f"{type(error).__name__}: {error}"
    return answer


async def read(connection: Connection, delivery: Delivery, answer: Answer) -> None:
    """Read a response into an answer."""
    if delivery.leave_after == -1:
        await connection.writer.drain()
        return
    answer.status = (await connection.read_head()).status
    if not delivery.stream or answer.status != 200:
        answer.take(json.loads(b"".join([piece async for piece in connection.pieces()])))
        answer.whole = True
        return
    num_events = 0
    async for event in connection.events():
        if num_events == delivery.leave_after:
            return
        if answer.whole:
            answer.fault = f"{event} after the end"
        elif event == DONE:
            answer.whole = True
        else:
            answer.take(json.loads(event))
        num_events += 1
        if delivery.pause_s:
            await asyncio.sleep(delivery.pause_s)


def problem(answer: Answer, delivery: Delivery, alone: Answer) -> str | None:
    """What is wrong with an answer, given that of the same request alone.

    A client that left has seen a part of it at most."""
    left = delivery.leave_after is not None and not answer.whole
    if answer.fault and not left:
        return answer.fault
    if left and not answer.choices:
        return None
    if answer.status != alone.status or answer.error:
        return f"{answer.status}: {answer.error}"
    if len(answer.ids) != 1:
        return f"ids {answer.ids}"
    if left:
        for index, choice in answer.choices.items():
            right = alone.choices[index]
            if not right.text.startswith(choice.text):
                return f"choice {index} begins {choice.text!r}, but alone {right.text!r}"
        return None
    if not answer.whole:
        return "it has no end"
    if answer.choices != alone.choices or answer.usage != alone.usage:
        return f"{answer.choices} {answer.usage}, but alone {alone.choices} {alone.usage}"
    return None


ALONE = Delivery({})
INVALID = [
    Question(COMPLETIONS, {"prompt": []}),
    Question(COMPLETIONS, {"prompt": "a", "max_tokens": -1}),
    Question(COMPLETIONS, {"prompt": "a", "temperature": "hot"}),
    Question(COMPLETIONS, {"prompt": [10**9]}),
    Question(COMPLETIONS, {"prompt": "a " * 5000}),
    Question(COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}),
    Question(COMPLETIONS, {"prompt": "a", "structured_outputs": {"regex": "("}}),
    Question(CHAT, {"messages": []}),
    Question(CHAT, {"messages": [{"role": "nobody", "content": "a"}]}),
    Question(CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
]
