"""A small random Llama with SmolLM2's tokenizer, and an engine of it for every test here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.llm import LLM
from tests.llm.helpers import assert_idle, save_tiny


@pytest.fixture(scope="session")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, smollm2)
    return folder


@pytest.fixture(scope="session")
def engines() -> Iterator[list[LLM]]:
    """At most one engine, for `llm` to use again."""
    kept: list[LLM] = []
    yield kept
    for engine in kept:
        engine.close()


@pytest.fixture
def llm(tiny: Path, engines: list[LLM]) -> Iterator[LLM]:
    """An idle engine with 64 blocks of 16 tokens and nothing in its prefix cache. A test that
    leaves a request or a block behind fails."""
    if not engines:
        engines.append(LLM(tiny, max_model_len=512, num_kv_blocks=64))
    engine = engines.pop()
    engine.reset_prefix_cache()
    yield engine
    assert_idle(engine)
    engines.append(engine)
