"""How many threads compute: what the machine, the cgroup and the settings say."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanovllm.llm import LLM
from nanovllm.worker import threads as threads_module
from nanovllm.worker.threads import available_cores, set_num_threads
from tests.kernels.test_attention import needs_native

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
CODE = """
import re, torch
from nanovllm.kernels import native
torch.ones(100, 100) @ torch.ones(100, 100)
native.functions()
with open("/proc/self/maps") as maps:
    print(*{line.split()[-1] for line in maps if re.search(r"lib[gi]?omp[^/]*$", line)})
"""


@pytest.fixture
def threads() -> Iterator[None]:
    """torch has as many threads afterwards as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def six_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which this process may run on cores 2 to 7."""
    cores = set(range(2, 8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores, raising=False)


def cgroup(root: Path, **files: str) -> Path:
    """A folder like /sys/fs/cgroup: max is version 2's file, quota and period version 1's."""
    names = {"max": "cpu.max", "quota": "cpu/cpu.cfs_quota_us", "period": "cpu/cpu.cfs_period_us"}
    (root / "cpu").mkdir()
    for key, text in files.items():
        (root / names[key]).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        ({"max": "max 100000"}, 6),
        ({"max": "200000 100000"}, 2),
        ({"max": "250000 100000"}, 3),
        ({"max": "5000 100000"}, 1),
        ({"max": "900000 100000"}, 6),
        ({"quota": "-1", "period": "100000"}, 6),
        ({"quota": "150000", "period": "50000"}, 3),
        ({"quota": "150000"}, 6),
        ({"max": "50000 50000", "quota": "400000", "period": "100000"}, 1),
        ({"max": ""}, 6),
        ({"max": "100000 0"}, 6),
    ],
)
def test_a_quota_of_the_cgroup_limits_the_cores(
    files: dict[str, str], cores: int, tmp_path: Path, six_cores: None
) -> None:
    assert available_cores(cgroup(tmp_path, **files)) == cores


def test_without_an_affinity_all_cores_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert available_cores(tmp_path) == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores(tmp_path) == 1


def test_numba_gets_the_same_number_up_to_what_it_has(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    config = SimpleNamespace(NUMBA_NUM_THREADS=2)
    fake = SimpleNamespace(config=config, set_num_threads=given.append)
    monkeypatch.setitem(sys.modules, "numba", fake)
    for count in (1, 2, 3):
        set_num_threads(count)
        assert torch.get_num_threads() == count
    assert given == [1, 2, 2]


def test_numba_is_not_imported_for_it(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    set_num_threads(1)
    assert "numba" not in sys.modules


def test_an_engine_takes_the_number_it_is_given_and_else_all_cores(
    tmp_path: Path, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    monkeypatch.setattr("nanovllm.worker.rank.default_num_threads", lambda: 2)
    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "num_kv_blocks": 4}
    for num_threads, expected in ((3, 3), (None, 2), (1, 1)):
        with LLM(tmp_path, num_threads=num_threads, **settings):
            assert torch.get_num_threads() == expected


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_the_native_kernels_share_torchs_openmp() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    [library] = done.stdout.split()
    assert Path(library).is_relative_to(Path(torch.__file__).parent)


@pytest.mark.parametrize(
    ("wanted", "expected"), [("1", 1), ("3", 3), ("64", 4), ("", 4), ("0", 4), ("2,1", 4)]
)
def test_the_default_heeds_omp_num_threads(
    wanted: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads_module, "available_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert threads_module.default_num_threads() == expected
