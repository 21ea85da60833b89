"""Profiles: whose time is whose, and that an engine is afterwards what it was before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nanovllm.cli import main
from nanovllm.errors import EngineDeadError
from nanovllm.layers.linear import Embedding, Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.llm import LLM
from nanovllm.profile import PARTS, Profile, products, profile
from nanovllm.sampling_params import SamplingParams
from nanovllm.tokenizer import Text

PARAMS = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0)
PROMPTS = ["Hello", "Good morning"]
LINEARS = 4 + 1  # of one layer, and the head


def make(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, num_kv_blocks=64, **settings)


def callables(llm: LLM) -> list[Any]:
    """What a profile replaces, and all else that can be called on the same objects."""
    core: Any = llm.engine.core
    runner = core.executor.runner
    owners = [runner, runner.table, core.scheduler, Text, *runner.model.modules()]
    return [
        {name: value for name, value in vars(owner).items() if callable(value)} for owner in owners
    ] + [runner.backend]


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_time_belongs_to_the_innermost_part_that_runs() -> None:
    clock = Clock()
    spent = Profile(clock)

    def product() -> str:
        clock.now_s += 4
        return "y"

    def sample() -> str:
        clock.now_s += 2
        y: str = spent.timed("products", product)()
        clock.now_s += 1
        return y

    spent.enter("the rest")
    clock.now_s += 8
    assert spent.timed("sampling", sample)() == "y"
    clock.now_s += 16
    spent.leave()
    clock.now_s += 100
    found = {name: (part.seconds, part.calls) for name, part in spent.parts.items() if part.seconds}
    assert found == {"products": (4, 1), "sampling": (3, 1), "the rest": (24, 0)}
    assert spent.seconds == 31


def test_a_call_that_fails_is_timed_too() -> None:
    clock = Clock()
    spent = Profile(clock)

    def fail() -> None:
        clock.now_s += 3
        raise ValueError("no")

    spent.enter("the rest")
    with pytest.raises(ValueError, match="no"):
        spent.timed("sampling", fail)()
    clock.now_s += 1
    spent.leave()
    assert (spent.parts["sampling"].seconds, spent.parts["the rest"].seconds) == (3, 1)


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}])
def test_every_part_of_a_step_is_counted(tiny: Path, settings: dict[str, Any]) -> None:
    with make(tiny, **settings) as llm, profile(llm) as spent:
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert spent.num_steps == 5
    assert {name: part.calls for name, part in spent.parts.items()} == {
        "products": 5 * LINEARS,
        "attention": 5 * 1,
        "norms": 5 * 3,
        "sampling": 5,
        "input preparation": 5 * 3,  # apply, prepare, plan
        "scheduling": 5 * 2,
        "detokenizing": 2 + 2 * 5,  # a text for each request, and each token of it
        "the rest": 5,
    }
    rows = spent.rows()
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert rows["products"]["ms_per_step"] == spent.parts["products"].seconds / 5 * 1000


def test_all_that_multiplies_with_weights_is_a_product() -> None:
    packed, plain, experts = Linear(2, 2), Linear(2, 2), nn.Module()
    packed.product = plain.forward
    experts.down = nn.Parameter(torch.zeros(3, 2, 2))
    model = nn.Sequential(Embedding(5, 2), packed, nn.Sequential(plain, RMSNorm(2, 0)), experts)
    assert list(products(model)) == [(packed, "product"), (plain, "forward"), (experts, "forward")]


def test_tokens_are_the_same_and_everything_is_restored(tiny: Path) -> None:
    with make(tiny) as llm:
        before = callables(llm)
        expected = [o.outputs for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        with profile(llm):
            assert callables(llm) != before
            found = [o.outputs for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        assert found == expected
        assert callables(llm) == before
        with pytest.raises(KeyboardInterrupt), profile(llm):
            raise KeyboardInterrupt
        assert callables(llm) == before


def test_a_closed_engine_has_no_profile(tiny: Path) -> None:
    llm = make(tiny)
    llm.close()
    with pytest.raises(EngineDeadError), profile(llm):
        pass


def test_throughput_shows_and_writes_the_profile_only_if_asked(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    words = ["bench", "throughput", "-m", str(tiny), "--num-kv-blocks", "64", "--num-prompts", "2"]
    words += ["--input-len", "7", "--output-len", "3", "--output-json", str(file)]
    assert main([*words, "--profile"]) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())["profile"]
    assert found["num_steps"] == 3
    assert list(found["parts"]) == list(PARTS)
    for row in found["parts"].values():
        assert row.keys() == {"seconds", "share", "calls", "ms_per_step"}
    assert sum(row["share"] for row in found["parts"].values()) == pytest.approx(1)
    lines = shown.splitlines()[3:]
    assert lines[0] == "" and lines[1].split() == [
        "part",
        "seconds",
        "share",
        "calls",
        "ms",
        "a",
        "step",
    ]
    assert [line[:20].strip() for line in lines[2:]] == [*PARTS, "all"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert main(words) == 0
    assert "products" not in capsys.readouterr().out
    assert "profile" not in json.loads(file.read_text())
