"""Rows of a batch as the sampler gets them."""

from typing import Any

import numpy as np

from nanovllm.core.plan import NewSequence
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import Array

Row = tuple[NewSequence, Array]


def row(
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    stop_token_ids: list[int] | None = None,
    **params: Any,
) -> Row:
    """A sequence with this prompt (token 0 unless said) and output; the rest is its parameters."""
    prompt, output = prompt or [0], output or []
    seq = NewSequence(
        0, prompt, len(prompt), 0, 0, SamplingParams(**params), list(stop_token_ids or [])
    )
    return seq, np.array(prompt + output, np.int64)
