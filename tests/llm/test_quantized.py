"""Models in fewer bits, run whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.errors import ModelLoadError
from nanovllm.llm import LLM
from tests.llm.helpers import greedy
from tests.models.gguf_files import quantized_gguf

VOCAB_SIZE = 48
PROMPTS = [[(37 * i + n) % VOCAB_SIZE for i in range(n)] for n in (2, 9, 40)]


def logprobs(path: Path, **settings: Any) -> Tensor:
    """Of every token of the vocabulary at every position of the prompts, and after them."""
    everything = greedy(1, logprobs=-1, prompt_logprobs=-1)
    with LLM(path, skip_tokenizer_init=True, num_kv_blocks=64, **settings) as llm:
        outputs = llm.generate(PROMPTS, everything, use_tqdm=False)
    positions = [
        entry
        for output in outputs
        for entry in (output.prompt_logprobs or [])[1:] + (output.outputs[0].logprobs or [])
    ]
    assert len(positions) == sum(map(len, PROMPTS))
    rows = [[entry[i].logprob for i in range(VOCAB_SIZE)] for entry in positions if entry]
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_gguf_run_from_its_own_blocks_is_the_dequantized_one(kind: str, tmp_path: Path) -> None:
    path = quantized_gguf(tmp_path / "model.gguf", kind)
    dense = logprobs(path, dtype="float32")
    assert dense.argmax(1).unique().numel() > 10  # not one token again and again
    assert torch.equal(logprobs(path, dtype="float32", quantization="gguf"), dense)
    for tokens in (8, 64):  # few rows are multiplied in another way than many
        settings = {"dtype": "bfloat16", "max_num_batched_tokens": tokens}
        kept = logprobs(path, quantization="gguf", **settings)
        torch.testing.assert_close(kept, dense, rtol=0, atol=0.15)


def test_blocks_of_a_gguf_cannot_be_had_from_another_checkpoint(tiny: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"tiny.*quantization='gguf' needs a \.gguf file as"):
        LLM(tiny, quantization="gguf", num_kv_blocks=64)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_in_fewer_bits_the_model_knows_the_capital_of_france(
    smollm2: Path, quantization: str, backend: str
) -> None:
    """In float32 each token of the answer is at least twice as likely as the next (0.85 nats)."""
    settings = {"dtype": "bfloat16", "max_model_len": 512, "num_kv_blocks": 64}
    content = "What is the capital of France? Answer in one sentence."
    with LLM(smollm2, quantization=quantization, attention_backend=backend, **settings) as llm:
        question = {"role": "user", "content": content}
        [output] = llm.chat([question], greedy(32, ignore_eos=False), use_tqdm=False)
    assert output["text"] == "The capital of France is Paris."
    assert output.outputs[0].finish_reason == "stop"
