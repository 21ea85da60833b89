"""What goes wrong while a server runs: clients that leave or do not read, parts that fail,
processes that are killed, too many at once. The number in a test's name is that of the fault."""

import asyncio
import json
import os
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanovllm.server.run import raise_file_limit
from tests.llm.helpers import make_ids
from tests.server.canary import SLACK_BYTES, Canary, until
from tests.server.faulty import (
    DIES,
    FAILS,
    HOUR_S,
    OUT_OF_MEMORY,
    UNDECODABLE,
    UNENCODABLE,
)
from tests.server.servers import LIMIT_S, Served

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
LONG: dict[str, Any] = {"prompt": make_ids(4, 16), "max_tokens": 8000, "ignore_eos": True}
SMALL = "--max-model-len", "512", "--num-kv-blocks", "64"
NUM_CONNECTIONS, NUM_STORM = 10_000, 200
SOME = b'{"prompt": [5, 6, 7], "max_tokens": 1}'
GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
POST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(SOME), SOME)
)


@pytest.fixture(scope="module")
def slow(tiny, tmp_path_factory) -> Iterator[Served]:
    """A server that takes long for long requests, two at a time, and has little patience."""
    flags = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--num-kv-blocks", "1024"]
    flags += ["--write-timeout", "0.5"]
    with Served(str(tiny), *flags, log=tmp_path_factory.mktemp("slow") / "log") as served:
        yield served


@pytest.fixture(scope="module")
def slow_and_well(slow) -> Canary:
    return Canary(slow)


@pytest.fixture(scope="module")
def faulty(tiny, tmp_path_factory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("faulty") / "log"
    with Served(str(tiny), *SMALL, log=log, program="tests.server.faulty") as served:
        yield served


@pytest.fixture(scope="module")
def faulty_yet_well(faulty) -> Canary:
    return Canary(faulty)


def start(server: Served, *, receive_bytes: int | None = None, **body: Any) -> socket.socket:
    """Send a request for a completion; the answer is still to be read."""
    url, data = httpx.URL(server.url), json.dumps(body).encode()
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(LIMIT_S)
    connection.connect((url.host, url.port))
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def num_aborted(server: Served) -> float:
    return server.metric("request_success_total", finished_reason="abort")


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def child_of(server: Served, module: str = "nanovllm.server.render") -> int:
    """The process that runs a module: the one that renders chat templates, or another."""
    tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")
    children = [int(pid) for task in tasks for pid in task.read_text().split()]
    [child] = [pid for pid in children if module in Path(f"/proc/{pid}/cmdline").read_text()]
    return child


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# Clients


@pytest.mark.parametrize("stream", [True, False])
def test_31_clients_leave_while_queued(slow, slow_and_well, stream):
    before = num_aborted(slow)
    with slow_and_well.singing():
        leaving = [start(slow, **LONG, stream=stream) for _ in range(4)]
        until(lambda: slow.metric("num_requests_waiting") >= 3, "three wait")
        for connection in leaving:
            connection.close()
        until(lambda: num_aborted(slow) == before + 4, "all are aborted")
    assert num_aborted(slow) == before + 4


@pytest.mark.parametrize("stream", [True, False])
def test_31_a_client_leaves_in_prefill(slow, slow_and_well, stream):
    before, computed = num_aborted(slow), "request_prefill_kv_computed_tokens_sum"
    with slow_and_well.singing():
        with start(slow, **{**LONG, "prompt": make_ids(5, 8000), "max_tokens": 9}, stream=stream):
            until(lambda: slow.metric("kv_cache_usage_perc") > 0.4, "its prompt has blocks")
        until(lambda: num_aborted(slow) == before + 1, "it is aborted")
    assert slow.metric(computed) < 8000


@pytest.mark.parametrize("stream", [True, False])
def test_31_a_client_leaves_in_decode(slow, slow_and_well, stream):
    before = num_aborted(slow)
    with slow_and_well.singing():
        with start(slow, **LONG, stream=stream) as connection:
            until(lambda: slow.metric("num_requests_running") == 2, "it runs beside the canary")
            if stream:
                assert connection.recv(1000).startswith(b"HTTP/1.1 200 ")
        until(lambda: num_aborted(slow) == before + 1, "it is aborted")


def test_31_one_of_several_prompts_leaves_none_behind(slow, slow_and_well):
    before, prompts = num_aborted(slow), [make_ids(seed, 16) for seed in range(6, 12)]
    with slow_and_well.singing():
        with start(slow, **{**LONG, "prompt": prompts, "n": 2, "stream": True}):
            until(lambda: slow.metric("num_requests_waiting") >= 10, "most wait")
        until(lambda: num_aborted(slow) == before + 12, "all are aborted")


def test_32_a_client_that_reads_nothing_is_ended(slow, slow_and_well):
    before, most_bytes = num_aborted(slow), 0
    many = {"prompt": make_ids(12, 4000), "prompt_logprobs": 20, "logprobs": 20}

    def is_ended() -> bool:
        nonlocal most_bytes
        most_bytes = max(most_bytes, slow_and_well.resident_bytes())
        return num_aborted(slow) == before + 1

    with slow_and_well.singing():
        with start(
            slow, receive_bytes=4096, **{**LONG, **many, "max_tokens": 4000, "stream": True}
        ):
            until(is_ended, "it is aborted")
        assert most_bytes < slow_and_well.num_bytes + SLACK_BYTES


# Parts that fail


@pytest.mark.parametrize("stream", [True, False])
def test_33_a_tokenizer_that_fails_is_one_500(faulty, faulty_yet_well, stream):
    with faulty_yet_well.singing():
        for _ in range(3):
            response = faulty.post(COMPLETE, prompt=UNENCODABLE, stream=stream)
            assert "internal error" in error_of(response, 500)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", [[5, UNDECODABLE], [5, UNDECODABLE, 6]], ids=["late", "early"])
def test_33_a_detokenizer_that_fails_is_one_500(faulty, faulty_yet_well, prompt, stream):
    """With the first token, or as soon as it reads the prompt's end."""
    name, before = "request_success_total", num_aborted(faulty)
    num_failed = faulty.metric(name, finished_reason="error")
    with faulty_yet_well.singing():
        for _ in range(3):
            response = faulty.post(COMPLETE, prompt=prompt, stream=stream, max_tokens=50)
            assert "the detokenizer failed" in error_of(response, 500)
    assert faulty.metric(name, finished_reason="error") == num_failed + 3
    assert num_aborted(faulty) == before


@pytest.mark.parametrize("fault", [FAILS, OUT_OF_MEMORY])
@pytest.mark.parametrize("stream", [True, False])
def test_34_a_step_that_fails_ends_what_is_in_it_and_the_engine_goes_on(
    faulty, faulty_yet_well, fault, stream
):
    why = "a kernel failed" if fault == FAILS else "no memory is left"
    with start(faulty, **{**LONG, "max_tokens": 490}, stream=True) as beside:
        assert beside.recv(1).startswith(b"H")  # it runs
        response = faulty.post(COMPLETE, prompt=[5, fault], stream=stream)
        assert why in error_of(response, 500)
        text = beside.recv(10**6)
        while b"[DONE]" not in text:
            text += beside.recv(10**6)
        assert why.encode() in text or text.count(b'"finish_reason":"length"') == 1
    faulty_yet_well.check()


def test_34_an_engine_that_dies_tells_all_and_the_process_ends_with_1(tiny, tmp_path):
    program = "tests.server.faulty"
    flags = str(tiny), "--max-num-seqs", "3", "--num-kv-blocks", "2048"
    with (
        Served(*flags, log=tmp_path / "log", program=program) as served,
        ThreadPoolExecutor(1) as pool,
        start(served, **LONG, stream=True) as stream,
        start(served, **LONG) as whole,
    ):
        assert stream.recv(1) == b"H"
        until(lambda: served.metric("num_requests_running") == 2, "both run")
        dying = pool.submit(served.post, COMPLETE, prompt=[5, DIES])
        assert "the engine died" in error_of(dying.result(), 503)
        assert served.process.wait(LIMIT_S) == 1
        told = read_all(stream)
        assert b"the engine died" in told and told.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
        answer = read_all(whole)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"the engine died" in answer
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{served.url}/health")
    assert "nanovllm: error: the engine died" in (tmp_path / "log").read_text()


def test_39_a_wall_clock_that_jumps_changes_nothing(faulty, faulty_yet_well):
    """That of this server is an hour off, forth and back, each time it is looked at."""
    with faulty_yet_well.singing():
        for _ in range(4):
            assert faulty.post(CHAT, messages=HI, max_tokens=4).status_code == 200
    names = ["e2e_request_latency", "time_to_first_token", "inter_token_latency"]
    names += [f"request_{name}_time" for name in ("queue", "prefill", "decode", "inference")]
    for name in names:
        assert 0 <= faulty.metric(f"{name}_seconds_sum") < HOUR_S / 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_39_a_full_disk_ends_the_recording_and_nothing_else(tiny, tmp_path):
    log, why = tmp_path / "log", "/dev/full: the recording ends here: [Errno 28]"

    def is_told() -> bool:
        assert served.post(COMPLETE, prompt="x", max_tokens=4).status_code == 200
        return why in log.read_text()

    with Served(str(tiny), *SMALL, "--record", "/dev/full", log=log) as served:
        until(is_told, "it is in the log")
        well = Canary(served)
        with well.singing():
            for _ in range(4):
                assert served.post(COMPLETE, prompt="x", max_tokens=4).status_code == 200
    assert log.read_text().count("the recording") == 1


# Processes


def test_35_a_killed_template_process_is_replaced(faulty, faulty_yet_well):
    with faulty_yet_well.singing():
        child = child_of(faulty)
        os.kill(child, signal.SIGKILL)
        until(lambda: is_gone(child), "it has ended")
        status = faulty.post(CHAT, messages=HI, max_tokens=1).status_code
        assert status in (200, 500)  # 500 if it was not known yet
        assert faulty.post(CHAT, messages=HI, max_tokens=1).status_code == 200
        assert child_of(faulty) != child


def test_37_a_stopped_template_process_is_replaced_after_a_deadline(faulty, faulty_yet_well):
    with faulty_yet_well.singing():
        child = child_of(faulty)
        os.kill(child, signal.SIGSTOP)
        assert "took more than" in error_of(faulty.post(CHAT, messages=HI), 500)
        assert is_gone(child)
        assert faulty.post(CHAT, messages=HI, max_tokens=1).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_35_and_37_a_lost_rank_tells_all_and_the_process_ends_with_1(tiny, tmp_path, number):
    """One that hangs is noticed by the time that a step takes."""
    flags = str(tiny), *SMALL, "-tp", "2", "--distributed-timeout-seconds", "2"
    with (
        Served(*flags, log=tmp_path / "log") as served,
        start(served, **{**LONG, "max_tokens": 490}, stream=True) as stream,
        start(served, **{**LONG, "max_tokens": 490}) as whole,
    ):
        assert stream.recv(1) == b"H"
        os.kill(child_of(served, "executor.follower"), number)
        assert served.process.wait(LIMIT_S) == 1
        told = read_all(stream)
        assert b"make a new engine" in told and told.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
        assert read_all(whole).startswith(b"HTTP/1.1 503 ")


def test_35_a_rank_lost_while_the_server_is_idle_ends_it_too(tiny, tmp_path):
    with Served(str(tiny), *SMALL, "-tp", "2", log=tmp_path / "log") as served:
        os.kill(child_of(served, "executor.follower"), signal.SIGKILL)
        assert served.process.wait(LIMIT_S) == 1
    assert "rank 1 died (status -9)" in (tmp_path / "log").read_text()


def test_36_a_killed_server_takes_its_child_along_and_frees_its_port(tiny, tmp_path):
    with Served(str(tiny), *SMALL, log=tmp_path / "log") as served:
        child, url = child_of(served), httpx.URL(served.url)
        with start(served, **{**LONG, "max_tokens": 490}) as connection:
            until(lambda: served.metric("num_requests_running") == 1, "one runs")
            served.process.kill()
            assert served.process.wait(LIMIT_S) == -signal.SIGKILL
            with suppress(ConnectionResetError):
                assert read_all(connection) == b""
        until(lambda: is_gone(child), "the child has ended")
        with socket.create_server((url.host, url.port)):
            pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_38_a_server_that_is_to_end_lets_requests_end_and_takes_no_others(tiny, tmp_path, number):
    flags = str(tiny), "--num-kv-blocks", "1024", "--max-num-batched-tokens", "256"
    with Served(*flags, log=tmp_path / "log") as served:
        child = child_of(served)
        body = {**LONG, "max_tokens": 600}
        with start(served, **body, stream=True) as stream, start(served, **body) as whole:
            until(lambda: served.metric("num_requests_running") == 2, "both run")
            served.process.send_signal(number)
            until(lambda: served.http.get("/health").status_code == 503, "it drains")
            for path in (COMPLETE, CHAT):
                response = served.post(path, prompt="x", messages=HI)
                assert "shutting down" in error_of(response, 503)
                assert int(response.headers["Retry-After"]) > 0
            assert read_all(stream).count(b'"finish_reason":"length"') == 1
            assert b'"completion_tokens":600' in read_all(whole)
        assert served.process.wait(LIMIT_S) == 0
        assert is_gone(child)


def test_38_requests_that_do_not_end_in_time_are_ended(tiny, tmp_path):
    flags = str(tiny), "--num-kv-blocks", "1024", "--shutdown-timeout", "0.1"
    with (
        Served(*flags, log=tmp_path / "log") as served,
        start(served, **LONG, stream=True) as stream,
        start(served, **LONG) as whole,
    ):
        until(lambda: served.metric("num_requests_running") == 2, "both run")
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(LIMIT_S) == 0
        assert not read_all(stream).endswith(b"0\r\n\r\n")  # known to be cut
        assert not read_all(whole).startswith(b"HTTP/1.1 200 ")


def test_38_a_server_that_loads_ends_at_once(tiny, tmp_path):
    command = Served(str(tiny), log=tmp_path / "log").command
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "loads" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0


# Too many


async def ask_all(url: httpx.URL, count: int) -> Counter[bytes]:
    """Open so many connections, ask on each, hold all open, and count the statuses. Each tenth asks
    for a completion."""
    streams = []
    for number in range(count):
        streams.append(await asyncio.open_connection(url.host, url.port))
        streams[-1][1].write(GET if number % 10 else POST)
    lines = [await asyncio.wait_for(reader.readline(), LIMIT_S) for reader, _ in streams]
    for _, writer in streams:
        writer.close()
    return Counter(line.split(b" ")[1] for line in lines)


def test_40_ten_thousand_connections_get_an_answer_each(tiny, tmp_path):
    with Served(str(tiny), *SMALL, log=tmp_path / "log") as served:
        well = Canary(served, slack_bytes=2 * SLACK_BYTES)
        before = served.metric("request_success_total", finished_reason="length")
        count = min(NUM_CONNECTIONS, raise_file_limit() - 500)
        with well.singing():
            statuses = asyncio.run(ask_all(httpx.URL(served.url), count))
        assert statuses == {b"200": count}
        after = served.metric("request_success_total", finished_reason="length")
        assert after - before > count / 10  # the canary is among them


def test_40_connections_past_the_cap_get_503(tiny, tmp_path):
    served = Served(str(tiny), *SMALL, log=tmp_path / "log")
    served.command = ["bash", "-c", 'ulimit -n 300 && exec "$0" "$@"', *served.command]
    with served:
        well = Canary(served)
        statuses = asyncio.run(ask_all(httpx.URL(served.url), 250))
        well.check()
        assert statuses.total() == 250 and statuses.keys() == {b"200", b"503"}
        assert statuses[b"503"] >= 250 - (300 - 128)


def test_40_a_storm_on_a_small_cache_is_weathered(tiny, tmp_path):
    flags = str(tiny), "--num-kv-blocks", "32", "--max-model-len", "256"

    def ask(number: int) -> list[int]:
        body = {"prompt": make_ids(20 + number % 4, 40), "max_tokens": 40, "ignore_eos": True}
        body |= {"temperature": 0, "return_token_ids": True}
        with served.new_client() as client:  # its own: so many threads shake a shared one
            [choice] = client.post(COMPLETE, json=body).json()["choices"]
        return list(choice["token_ids"])

    with Served(*flags, log=tmp_path / "log") as served:
        alone, well = [ask(number) for number in range(4)], Canary(served)
        with well.singing(), ThreadPoolExecutor(NUM_STORM) as pool:
            outputs = list(pool.map(ask, range(NUM_STORM)))
        assert outputs == [alone[number % 4] for number in range(NUM_STORM)]
        assert 0 < served.metric("num_preemptions_total") < 2 * NUM_STORM
