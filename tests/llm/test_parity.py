"""The same tokens as transformers, whatever the engine's settings are: with the real SmolLM2, and
with small random models of other families."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm.llm import LLM
from nanovllm.outputs import Logprobs
from nanovllm.sampling_params import SamplingParams
from tests.llm.helpers import assert_idle, greedy, tokens_of
from tests.llm.prompts import PROMPTS
from tests.models.test_families import CASES, make_reference

FEW = slice(None, None, 2)  # half of the prompts, of every kind


def decode(theirs: Any, prompt: list[int], draft: list[int]) -> tuple[list[int], float]:
    """As many tokens as the draft has, decoded greedily by transformers.

    The draft is a guess that saves time and changes nothing (Leviathan et al., Fast Inference
    from Transformers via Speculative Decoding, 2023): one pass over it gives transformers' own
    choice at each position, which holds up to the first one that is not the draft's.

    Returns:
        the tokens, and the smallest lead of a chosen logit over the second.
    """
    tokens, lead, end = list(prompt), torch.inf, len(prompt) + len(draft)
    while len(tokens) < end:
        guess = draft[len(tokens) - len(prompt) :]
        ids = torch.tensor([tokens + guess[:-1]])
        with torch.inference_mode():
            top = theirs(ids, use_cache=False).logits[0, len(tokens) - 1 :].topk(2)
        own = top.indices[:, 0].tolist()
        same = [mine == other for mine, other in zip(own, guess, strict=True)]
        count = (same.index(False) if False in same else len(same) - 1) + 1
        tokens += own[:count]
        lead = min(lead, float((top.values[:, 0] - top.values[:, 1])[:count].min()))
    return tokens[len(prompt) :], lead


# SmolLM2

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    "num_kv_blocks": 256,
}
# what differs from SETTINGS
VARIATIONS: dict[str, dict[str, Any]] = {
    "blocks of 32": {"block_size": 32},
    "16 tokens a step": {"max_num_batched_tokens": 16},
    "64 tokens a step, blocks of 32": {"max_num_batched_tokens": 64, "block_size": 32},
    "512 tokens a step": {"max_num_batched_tokens": 512},
    "no chunks, no prefix cache": {
        "enable_chunked_prefill": False,
        "enable_prefix_caching": False,
    },
    "reference attention": {"attention_backend": "reference"},
}
SCARCE: dict[str, dict[str, Any]] = {
    "few blocks": {"num_kv_blocks": 20},
    "few blocks of 32, no prefix cache": {
        "num_kv_blocks": 14,
        "block_size": 32,
        "enable_prefix_caching": False,
    },
}


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    from nanovllm.tokenizer import Tokenizer

    return [Tokenizer(smollm2).encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[LLM]:
    with LLM(smollm2, **SETTINGS | {"max_num_seqs": 64}) as llm:
        yield llm


@pytest.fixture(scope="module")
def ours(engine: LLM) -> list[list[int]]:
    """64 tokens for each of the 32 prompts, all at once."""
    return tokens_of(engine.generate(PROMPTS, greedy(64), use_tqdm=False))


@pytest.fixture(scope="module")
def expected(theirs: Any, prompts: list[list[int]], ours: list[list[int]]) -> list[list[int]]:
    """What transformers decodes for them. No choice is so close that rounding could decide it."""
    decoded = [decode(theirs, *pair) for pair in zip(prompts, ours, strict=True)]
    assert min(lead for _, lead in decoded) > 1e-3
    return [tokens for tokens, _ in decoded]


def test_32_prompts_of_64_tokens_are_those_of_transformers(
    ours: list[list[int]], expected: list[list[int]]
) -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 32
    assert [len(tokens) for tokens in ours] == [64] * 32
    assert ours == expected


@pytest.mark.parametrize("index", [1, 27])
def test_the_reference_is_what_generate_of_transformers_gives(
    theirs: Any, prompts: list[list[int]], expected: list[list[int]], index: int
) -> None:
    ids = torch.tensor([prompts[index]])
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "max_new_tokens": 32, "eos_token_id": -1, "pad_token_id": 0}
    tokens = theirs.generate(ids, attention_mask=mask, **options)[0, ids.shape[1] :].tolist()
    assert tokens == expected[index][:32]


def test_a_second_run_finds_its_prompts_in_the_cache_and_gives_the_same(
    engine: LLM, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    outputs = engine.generate(PROMPTS[FEW], greedy(24), use_tqdm=False)
    assert tokens_of(outputs) == [tokens[:24] for tokens in expected[FEW]]
    stored = [len(prompt) // 16 * 16 for prompt in prompts[FEW]]
    whole = [min(n, len(p) - 1) for n, p in zip(stored, prompts[FEW], strict=True)]
    assert [output.num_cached_tokens for output in outputs] == whole


@pytest.mark.parametrize("max_num_seqs", [4, 16])
def test_the_tokens_are_the_same_however_many_run_at_once(
    smollm2: Path, expected: list[list[int]], max_num_seqs: int
) -> None:
    with LLM(smollm2, **SETTINGS | {"max_num_seqs": max_num_seqs}) as llm:
        outputs = llm.generate(PROMPTS, greedy(16), use_tqdm=False)
    assert tokens_of(outputs) == [tokens[:16] for tokens in expected]


@pytest.mark.parametrize("name", VARIATIONS)
def test_the_tokens_are_the_same_with(smollm2: Path, expected: list[list[int]], name: str) -> None:
    with LLM(smollm2, **SETTINGS | VARIATIONS[name]) as llm:
        outputs = llm.generate(PROMPTS[FEW], greedy(24), use_tqdm=False)
        assert llm.get_metrics()["num_preemptions_total"] == 0
    assert tokens_of(outputs) == [tokens[:24] for tokens in expected[FEW]]


@pytest.mark.parametrize("name", SCARCE)
def test_the_tokens_are_the_same_though_requests_are_preempted_with(
    smollm2: Path, expected: list[list[int]], name: str
) -> None:
    with LLM(smollm2, **SETTINGS | SCARCE[name]) as llm:
        outputs = llm.generate(PROMPTS[FEW], greedy(24), use_tqdm=False)
        assert llm.get_metrics()["num_preemptions_total"] > 0
        assert_idle(llm)
    assert tokens_of(outputs) == [tokens[:24] for tokens in expected[FEW]]


@pytest.mark.parametrize("index", [2, 10, 23, 24])
def test_logprobs_of_prompt_and_output_are_those_of_transformers(
    engine: LLM, theirs: Any, prompts: list[list[int]], index: int
) -> None:
    params = greedy(12, logprobs=20, prompt_logprobs=20)
    [output] = engine.generate([prompts[index]], params, use_tqdm=False)
    tokens = prompts[index] + output.outputs[0].token_ids
    with torch.inference_mode():
        logprobs = theirs(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    positions = output.prompt_logprobs + output.outputs[0].logprobs
    assert len(positions) == len(tokens)
    assert positions[0] is None
    for token_id, found, row in zip(tokens[1:], positions[1:], logprobs, strict=False):
        assert found is not None
        assert token_id in found
        assert 20 <= len(found) <= 21
        check_logprobs(found, row)


def test_logprobs_of_the_whole_vocabulary_are_those_of_transformers(
    engine: LLM, theirs: Any, prompts: list[list[int]]
) -> None:
    params = greedy(1, logprobs=-1, detokenize=False)
    [output] = engine.generate([prompts[0]], params, use_tqdm=False)
    with torch.inference_mode():
        row = theirs(torch.tensor([prompts[0]])).logits[0, -1].log_softmax(-1)
    assert output.outputs[0].logprobs is not None
    [found] = output.outputs[0].logprobs
    assert len(found) == len(row)
    check_logprobs(found, row)


def check_logprobs(found: Logprobs, logprobs_V: torch.Tensor) -> None:
    """Each is within 1e-4 of transformers', and the ranks follow the values."""
    got = torch.tensor([entry.logprob for entry in found.values()])
    torch.testing.assert_close(got, logprobs_V[list(found)], atol=1e-4, rtol=0)
    ranked = sorted(found.values(), key=lambda entry: entry.rank)
    assert ranked == sorted(ranked, key=lambda entry: -entry.logprob)
    assert ranked[0].rank == 1


def test_in_its_own_dtype_the_model_knows_the_capital_of_france(smollm2: Path) -> None:
    with LLM(smollm2, max_model_len=512, num_kv_blocks=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=32)
        content = "What is the capital of France? Answer in one sentence."  # no choice is close
        [output] = llm.chat([{"role": "user", "content": content}], params, use_tqdm=False)
    assert output["text"] == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"


# Small random models

SMALL_CASES = {
    "qwen3": CASES["qwen3"],
    "llama, tied, biases, head_dim": CASES["llama, tied, biases, head_dim"],
    "mistral, window": CASES["mistral, window"],
    "qwen3_moe": CASES["qwen3_moe"],
}
SMALL_VARIATIONS: list[dict[str, Any]] = [
    {"block_size": 1},
    {"block_size": 7, "max_num_batched_tokens": 9, "max_num_seqs": 3},
    {"enable_prefix_caching": False, "max_num_batched_tokens": 16},
    {"enable_chunked_prefill": False, "max_num_batched_tokens": 128},
    {"attention_backend": "reference", "block_size": 4},
]
SMALL_SCARCE: list[dict[str, Any]] = [
    {"block_size": 4, "num_kv_blocks": 28},
    {"block_size": 4, "num_kv_blocks": 28, "enable_prefix_caching": False},
    {"block_size": 1, "num_kv_blocks": 100, "max_num_batched_tokens": 8},
    {"block_size": 16, "num_kv_blocks": 6, "scheduling_policy": "priority"},
]
SMALL_PROMPTS = [[(37 * i + 5) % 199 for i in range(n)] for n in (9, 24, 32)] + [
    [(53 * i + n) % 199 for i in range(n)] for n in (1, 16, 40)
]
NUM_NEW = 32


@pytest.fixture(scope="module", params=SMALL_CASES)
def small(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a small random model, and transformers' model of it."""
    family, overrides = SMALL_CASES[request.param]
    model = make_reference(family, overrides | {"max_position_embeddings": 128})
    folder = tmp_path_factory.mktemp("small")
    model.save_pretrained(folder)
    return folder, model


def run_small(folder: Path, settings: dict[str, Any], params: Any) -> tuple[list[list[int]], float]:
    """The tokens of each sample of the prompts, and the number of preemptions."""
    with LLM(folder, skip_tokenizer_init=True, **{"num_kv_blocks": 800} | settings) as llm:
        outputs = llm.generate(SMALL_PROMPTS, params, use_tqdm=False)
        assert_idle(llm)
        return tokens_of(outputs), llm.get_metrics()["num_preemptions_total"]


def test_a_small_model_gives_transformers_tokens_whatever_the_settings(
    small: tuple[Path, Any],
) -> None:
    folder, theirs = small
    first, _ = run_small(folder, {}, greedy(NUM_NEW))
    decoded = [decode(theirs, *pair) for pair in zip(SMALL_PROMPTS, first, strict=True)]
    assert min(lead for _, lead in decoded) > 1e-4
    expected = [tokens for tokens, _ in decoded]
    for settings in SMALL_VARIATIONS:
        assert run_small(folder, settings, greedy(NUM_NEW)) == (expected, 0), settings
    for settings in SMALL_SCARCE:
        tokens, num_preemptions = run_small(folder, settings, greedy(NUM_NEW))
        assert (tokens, num_preemptions > 0) == (expected, True), settings


def test_seeded_samples_of_a_small_model_are_the_same_whatever_the_settings(
    small: tuple[Path, Any],
) -> None:
    folder, _ = small
    params = [
        SamplingParams(n=1 + i % 2, seed=100 + i, max_tokens=24, ignore_eos=True, top_k=40 * i)
        for i in range(len(SMALL_PROMPTS))
    ]
    expected, _ = run_small(folder, {}, params)
    assert run_small(folder, SMALL_VARIATIONS[1], params) == (expected, 0)
    for settings in SMALL_SCARCE[:2]:
        tokens, num_preemptions = run_small(folder, settings, params)
        assert (tokens, num_preemptions > 0) == (expected, True), settings


def test_logprobs_of_a_small_model_are_whole_and_the_same_whatever_the_settings(
    small: tuple[Path, Any],
) -> None:
    folder, _ = small

    def run(settings: dict[str, Any]) -> tuple[torch.Tensor, float]:
        """At each position: of the token there, and of the likeliest two."""
        params = greedy(24, logprobs=2, prompt_logprobs=2)
        values = []
        with LLM(folder, skip_tokenizer_init=True, **{"num_kv_blocks": 800} | settings) as llm:
            for output in llm.generate(SMALL_PROMPTS, params, use_tqdm=False):
                tokens = output.prompt_token_ids + output.outputs[0].token_ids
                entries = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
                for token_id, entry in list(zip(tokens, entries, strict=True))[1:]:
                    assert entry is not None
                    likeliest = sorted(found.logprob for found in entry.values())[-2:]
                    values.append([entry[token_id].logprob, *likeliest])
            return torch.tensor(values), llm.get_metrics()["num_preemptions_total"]

    expected, _ = run({})
    for settings in SMALL_VARIATIONS[1:3] + SMALL_SCARCE[:2]:
        logprobs, num_preemptions = run(settings)
        torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
        assert (num_preemptions > 0) == (settings in SMALL_SCARCE)
