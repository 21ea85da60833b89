"""Random requests over real HTTP, in a tiny KV pool: each gets the answer that it gets alone.

A few rounds, always the same; with FUZZ_MINUTES, others for so long.
"""

import asyncio
import os
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from tests.server.process import num_files
from tests.server.servers import LIMIT_S, Served
from tests.server.traffic import ALONE, CROWDED, Answer, ask, deliveries, problem, questions

NUM_ROUNDS = 4
NUM_QUESTIONS = 30  # in a round; each is asked twice at random times, and once alone


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("fuzz") / "log"
    with Served(str(tiny), *CROWDED, log=log) as server:
        yield server


async def play(url: str, seed: int) -> list[str]:
    """One round; returns what went wrong."""
    rng, asked = Random(seed), list(islice(questions(seed), NUM_QUESTIONS))
    order = rng.sample(asked * 2, 2 * NUM_QUESTIONS)
    plays = list(zip(order, deliveries(seed), strict=False))
    tasks: list[asyncio.Task[Answer]] = []
    pending: set[asyncio.Task[Answer]] = set()
    while len(tasks) < len(plays):  # bursts of arrivals, each when some of the last are over
        for question, delivery in plays[len(tasks) :][: rng.randint(1, 12)]:
            tasks.append(asyncio.create_task(ask(url, question, delivery)))
        pending |= set(tasks[-12:])
        most = rng.randint(0, 24)
        while len(pending) > most:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    answers = await asyncio.gather(*tasks)
    alone = {id(question): await ask(url, question, ALONE) for question in asked}
    problems = [
        f"seed {seed}: {question} alone: {answer}"
        for question in asked
        if (answer := alone[id(question)]).status != 200 or answer.fault
    ]
    for (question, delivery), answer in zip(plays, answers, strict=True):
        if found := problem(answer, delivery, alone[id(question)]):
            problems.append(f"seed {seed}: {question} {delivery}: {found}")
    return problems


def wait_for_rest(server: Served, most_files: int = 2**20) -> None:
    """Until the server holds nothing of any request, and no more descriptors than so many."""
    deadline = time.monotonic() + LIMIT_S
    gauges = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
    while any(server.metric(name) for name in gauges) or num_files(server.process.pid) > most_files:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_random_requests_get_the_answers_that_they_get_alone(server: Served) -> None:
    minutes = float(os.environ.get("FUZZ_MINUTES", "0"))
    start = Random().randrange(2**31) if minutes else 0
    wait_for_rest(server)
    end, files, seed = time.monotonic() + 60 * minutes, num_files(server.process.pid), start
    while seed < start + NUM_ROUNDS or time.monotonic() < end:
        problems = asyncio.run(play(server.url, seed))
        assert not problems, "\n".join(problems)
        wait_for_rest(server, files)
        seed += 1
    assert server.metric("num_preemptions_total") > 0
    assert server.metric("prefix_cache_hits_total") > 0
    metrics = server.http.get("/metrics").text
    assert not re.search(r'finished_reason="abort",.*} 0.0$', metrics, re.MULTILINE)
    assert re.search(r'finished_reason="error",.*} 0.0$', metrics, re.MULTILINE)
