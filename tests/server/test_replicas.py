"""Several engines behind one server: where requests go, and what happens when one dies.

The tests of the server share one, in this order: the last one ends it.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from types import ModuleType
from typing import Any

import httpx
import pytest

from nanovllm.errors import ConfigError, MissingDependencyError
from nanovllm.server.app import build_app
from nanovllm.server.config import ServerConfig
from nanovllm.server.guard import ServerState
from nanovllm.server.replicas.front import Replicas, merge_metrics
from nanovllm.server.replicas.index import PrefixIndex, prefix_hashes
from nanovllm.server.run import load
from nanovllm.server.service import Service
from tests.llm.helpers import make_ids
from tests.server.servers import LIMIT_S, Served
from tests.server.test_faults import start

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
SETTINGS: dict[str, Any] = {
    "model": "smollm2-135m",
    "dtype": "float32",
    "max_model_len": 512,
    "num_kv_blocks": 512,
    "scheduling_policy": "priority",
}


def test_hashes_are_of_whole_prefixes() -> None:
    first = prefix_hashes([1, 2, 3, 4, 5], 2)
    assert len(first) == 2
    assert prefix_hashes([1, 2, 3, 9], 2)[0] == first[0]
    assert prefix_hashes([1, 2, 3, 9], 2)[1] != first[1]
    assert prefix_hashes([9, 9, 3, 4], 2)[1] != first[1]
    assert prefix_hashes([1, 2], 2, "salt") != first[:1]


def test_the_longest_match_wins_unless_it_is_busy() -> None:
    index, hashes = PrefixIndex(8), prefix_hashes(range(8), 2)
    index.add("a", hashes[:1])
    index.add("b", hashes)
    assert index.choose(hashes, {"a": 0, "b": 2}, 2) == "b"
    assert index.choose(hashes, {"a": 0, "b": 3}, 2) == "a"
    index.keep(["a"])
    assert index.match("b", hashes) == 0
    assert index.choose([], {"a": 1, "b": 0}, 2) == "b"


def test_the_end_of_what_is_unused_is_forgotten() -> None:
    index, hashes = PrefixIndex(3), prefix_hashes(range(6), 2)
    index.add("a", hashes)
    index.add("a", [b"new"])
    assert index.match("a", hashes) == 2
    assert index.match("a", [b"new"]) == 1


def test_metrics_of_replicas_share_a_head() -> None:
    one = b'# HELP vllm:x y\n# TYPE vllm:x gauge\nvllm:x{engine="0"} 1.0\n'
    both = merge_metrics([one, one.replace(b'"0"', b'"1"')]).decode().splitlines()
    assert both[2:] == ['vllm:x{engine="0"} 1.0', 'vllm:x{engine="1"} 1.0']
    assert len(both) == 4


def test_ranks_cannot_be_placed_by_ray_too() -> None:
    with pytest.raises(ConfigError, match="distributed_executor_backend='ray'"):
        Replicas({**SETTINGS, "distributed_executor_backend": "ray"}, "a", 2, 8)


@pytest.mark.parametrize("ray", [None, ModuleType("ray")], ids=["no ray", "ray without serve"])
def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, ray: Any) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    with pytest.raises(MissingDependencyError, match=r"ray\[serve\]: pip install 'nano-vllm\[ray"):
        Replicas(SETTINGS, "a", 2, 8)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = [w for k, v in SETTINGS.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    flags += ["-dp", "2", "--enable-dev-endpoints", "--served-model-name", "a", "b"]
    short = tempfile.mkdtemp(prefix="nv")  # the names of sockets have at most 107 characters
    environment = {"OMP_NUM_THREADS": "1", "RAY_TMPDIR": short}
    log = tmp_path_factory.mktemp("served") / "log"
    try:
        with Served(*flags, log=log, environment=environment) as server:
            yield server
    finally:
        shutil.rmtree(short, ignore_errors=True)


def ask(server: Served, prompt: list[int], **more: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    return server.post(COMPLETE, **{**body, "return_token_ids": True, **more})


def soon(condition: Callable[[], bool], what: str) -> None:
    """As `until`, and gently: what is waited for needs the same cores."""
    deadline_s = time.monotonic() + 2 * LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never: {what}"
        time.sleep(0.1)


def processes(server: Served) -> dict[str, int]:
    """The process of each replica by its number, as the server last logged them."""
    lines = [x for x in server.log.read_text().splitlines() if x.startswith('{"replicas"')]
    found: dict[str, int] = json.loads(lines[-1])["replicas"]
    return found


def are_back(server: Served, before: dict[str, int], dead: set[int]) -> bool:
    now = processes(server)
    return now.keys() == before.keys() and not dead & set(now.values())


SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
TERMS = {"user": "me", "ttft_target_ms": 500, "priority": 3, "cache_salt": "mine"}
HI = [{"role": "user", "content": "Name a colour."}]
FORM = {"structured_outputs": {"regex": "[a-z]{3}, [0-9]{2}"}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETE, {"prompt": make_ids(70, 20), "n": 2, "seed": 7, "logprobs": 3, "max_tokens": 6}),
    (COMPLETE, {"prompt": [make_ids(71, 40), make_ids(72, 9)], "echo": True, **SHORT}),
    (COMPLETE, {"prompt": "A word: ", **FORM, **SHORT, "max_tokens": 20}),
    (COMPLETE, {"prompt": make_ids(73, 40), **TERMS, **SHORT}),
    (COMPLETE, {"prompt": make_ids(73, 40), **TERMS, **SHORT}),  # cached now
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 2, **TERMS, **SHORT}),
]


def test_answers_are_those_of_one_engine(served: Served) -> None:
    async def ask_one() -> list[Any]:
        service = Service(ServerConfig(), ["a", "b"], ServerState(ready=True))
        engine = service.loaded = await load(service, SETTINGS)
        transport = httpx.ASGITransport(build_app(service))
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://one") as http:
                return [(await http.post(path, json=body)).json() for path, body in BODIES]
        finally:
            await engine.templates.close()
            engine.llm.close()

    ones = asyncio.run(ask_one())
    several = [served.post(path, **body).json() for path, body in BODIES]
    for one, other in zip(ones, several, strict=True):
        assert plain(other["choices"]) == plain(one["choices"])
        assert other["usage"] == one["usage"]
    assert several[4]["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


def plain(value: Any) -> Any:
    """With what float32 may make different in another process rounded away."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def test_both_names_are_served_and_prefixes_can_be_forgotten(served: Served) -> None:
    assert [m["id"] for m in served.http.get("/v1/models").json()["data"]] == ["a", "b"]
    for name, num_cached in (("a", 0), ("b", 32)):
        details = ask(served, make_ids(74, 40), model=name).json()["usage"]["prompt_tokens_details"]
        assert details == {"cached_tokens": num_cached}
    assert served.post("/reset_prefix_cache").status_code == 200
    usage = ask(served, make_ids(74, 40)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}


def test_requests_go_where_their_prefix_is(served: Served) -> None:
    """max_tokens tells, in the metrics of each replica, which one the prefix was first at."""
    prefixes = [make_ids(seed, 32) for seed in range(20)]
    homes = []
    for prefix in prefixes:
        before = served.metric("prompt_tokens_total", engine="0")
        assert ask(served, prefix, max_tokens=1).status_code == 200
        homes.append(int(served.metric("prompt_tokens_total", engine="0") == before))
    assert set(homes) == {0, 1}

    def num_at_home() -> float:
        name = "request_params_max_tokens_bucket"
        of_0 = served.metric(name, engine="0", le="1.0")
        return of_0 + sum(
            sign * served.metric(name, engine="1", le=le) for le, sign in (("2.0", 1), ("1.0", -1))
        )

    order, before = [i % 20 for i in range(200)], num_at_home()
    random.Random(0).shuffle(order)

    def send(i: int) -> int:
        prompt = prefixes[order[i]] + make_ids(100 + i, 8)
        body = {"prompt": prompt, "temperature": 0, "max_tokens": 1 + homes[order[i]]}
        return served.post(COMPLETE, **body).status_code

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(send, range(200))) == {200}
    print(f"{num_at_home() - before:g} of 200 at home; prefixes at each: {Counter(homes)}")
    assert num_at_home() - before >= 160


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_request_along(served: Served, stream: bool) -> None:
    def num_aborted() -> float:
        return served.metric("request_success_total", finished_reason="abort")

    before, num_before = num_aborted(), served.metric("generation_tokens_total")
    body = {"prompt": make_ids(80, 16), "max_tokens": 450, "ignore_eos": True, "stream": stream}
    with start(served, **body):
        soon(lambda: served.metric("num_requests_running") == 1, "it runs")
    soon(lambda: num_aborted() == before + 1, "it is aborted")
    assert served.metric("num_requests_running") == 0
    assert served.metric("generation_tokens_total") - num_before < 450


def test_a_replica_that_is_killed_is_replaced(served: Served) -> None:
    """Every request is answered, or told what happened; the other replica goes on."""
    canary = ask(served, make_ids(1, 40)).json()["choices"][0]["token_ids"]
    before, begun = processes(served), Semaphore(0)

    def stream(i: int) -> str:
        body = {"prompt": make_ids(200 + i, 40), "max_tokens": 100, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True}
        token_ids: list[int] = []
        with served.new_client() as client, client.stream("POST", COMPLETE, json=body) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        assert event["error"]["code"] == 503
                        assert event["error"]["message"].startswith("a replica was lost")
                        assert len(token_ids) < 100
                        return "told"
                    if not token_ids:
                        begun.release()
                    token_ids += event["choices"][0]["token_ids"]
        assert len(token_ids) == 100
        return "streamed"

    def whole(i: int) -> str:
        response = ask(served, make_ids(300 + i, 40), max_tokens=8)
        assert len(response.json()["choices"][0]["token_ids"]) == 8
        return "whole"

    with ThreadPoolExecutor(10) as pool:
        futures: list[Future[str]] = []
        while not all(served.metric("num_requests_running", engine=number) for number in before):
            futures.append(pool.submit(stream, len(futures)))
            assert begun.acquire(timeout=LIMIT_S)
        num_streams = len(futures)
        futures += [pool.submit(whole, i) for i in range(12)]
        os.kill(before["0"], signal.SIGKILL)
        start_s = time.monotonic()
        while not all(future.done() for future in futures):
            assert served.http.get("/metrics").status_code == 200
            assert served.http.get("/health").status_code == 200
            time.sleep(0.2)  # leaves the cores to others
        outcomes = Counter(future.result() for future in futures)
    soon(lambda: are_back(served, before, {before["0"]}), "it is back")
    print(f"{dict(outcomes)}; back after {time.monotonic() - start_s:.1f} s")
    assert outcomes["told"] >= 1 and outcomes["told"] + outcomes["streamed"] == num_streams
    assert outcomes["whole"] == 12
    assert processes(served)["1"] == before["1"]
    assert ask(served, make_ids(1, 40)).json()["choices"][0]["token_ids"] == canary


def test_requests_wait_while_no_replica_is_there(served: Served) -> None:
    before = processes(served)
    canary = ask(served, make_ids(1, 40)).json()["choices"][0]["token_ids"]
    for process in before.values():
        os.kill(process, signal.SIGKILL)
    soon(lambda: processes(served) == {}, "the server knows it")
    health = served.http.get("/health")
    assert health.status_code == 503
    assert health.json() == {"status": "no replica is there; another is being started"}
    assert served.http.get("/metrics").status_code == 200
    assert ask(served, make_ids(1, 40)).json()["choices"][0]["token_ids"] == canary
    soon(lambda: served.http.get("/health").status_code == 200, "one is there")


def test_sigterm_lets_requests_end(served: Served) -> None:
    replicas = processes(served).values()
    body = {"prompt": make_ids(90, 16), "max_tokens": 24, "ignore_eos": True, "stream": True}
    with served.new_client() as client, client.stream("POST", COMPLETE, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        soon(lambda: served.http.get("/health").status_code == 503, "it takes no more")
        assert served.http.get("/health").json() == {"status": "the server is shutting down"}
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert served.process.wait(LIMIT_S) == 0
    soon(lambda: not any(Path(f"/proc/{pid}").exists() for pid in replicas), "no replica is left")
    others = [line for line in served.log.read_text().splitlines() if not line.startswith("{")]
    assert others == []
