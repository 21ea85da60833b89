"""Merging outputs of several requests, and clients that leave."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from nanovllm.server.respond import leaving_cancels, merge


async def count(name: str, num: int, turn: asyncio.Event, closed: list[str]) -> AsyncGenerator[str]:
    try:
        for i in range(num):
            await turn.wait()
            yield f"{name}{i}"
    finally:
        closed.append(name)


@pytest.mark.parametrize("counts", [[3], [2, 1], [0, 3, 2], []])
def test_merging_yields_all_with_their_index_and_in_their_order(counts: list[int]) -> None:
    async def main() -> list[tuple[int, str]]:
        turn = asyncio.Event()
        turn.set()
        sources = [count(str(i), num, turn, closed) for i, num in enumerate(counts)]
        return [item async for item in merge(sources)]

    closed: list[str] = []
    found = asyncio.run(main())
    for i, num in enumerate(counts):
        assert [item for index, item in found if index == i] == [f"{i}{k}" for k in range(num)]
    assert sorted(closed) == [str(i) for i in range(len(counts))]


def test_a_fast_source_does_not_wait_for_a_slow_one() -> None:
    async def main() -> list[tuple[int, str]]:
        never, now = asyncio.Event(), asyncio.Event()
        now.set()
        merged = merge([count("slow", 1, never, closed), count("fast", 3, now, closed)])
        found = [await anext(merged) for _ in range(3)]
        await merged.aclose()
        return found

    closed: list[str] = []
    assert asyncio.run(main()) == [(1, "fast0"), (1, "fast1"), (1, "fast2")]
    assert sorted(closed) == ["fast", "slow"]  # both are over, the one that was waited for too


def test_an_error_in_one_source_closes_the_others() -> None:
    async def fail() -> AsyncGenerator[str]:
        raise ValueError("broken")
        yield ""

    async def main() -> None:
        async for _ in merge([count("other", 1, asyncio.Event(), closed), fail()]):
            pass

    closed: list[str] = []
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(main())
    assert closed == ["other"]


async def disconnects(after: asyncio.Event) -> dict[str, str]:
    await after.wait()
    return {"type": "http.disconnect"}


def test_a_client_that_leaves_ends_the_block_and_nothing_else() -> None:
    async def main() -> list[str]:
        leaves, trace = asyncio.Event(), []
        async with leaving_cancels(lambda: disconnects(leaves)) as gone:
            leaves.set()
            try:
                await asyncio.Event().wait()
            finally:
                trace.append("cancelled")
        trace.append(f"left {gone.done()}")
        await asyncio.sleep(0)  # the task itself goes on
        return trace

    assert asyncio.run(main()) == ["cancelled", "left True"]


def test_a_client_that_stays_changes_nothing_and_other_cancellations_pass() -> None:
    async def main(*, cancelled: bool) -> str:
        task = asyncio.current_task()
        assert task is not None
        async with leaving_cancels(lambda: disconnects(asyncio.Event())):
            if cancelled:
                task.cancel()
            await asyncio.sleep(0)
        return "done"

    assert asyncio.run(main(cancelled=False)) == "done"
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main(cancelled=True))
