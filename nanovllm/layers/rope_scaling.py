"""Rotary embeddings for contexts longer than the model was first trained for.

Each kind slows some of the D/2 rotations down. All are worked out in float32 and in the order that
transformers uses, since at a position of 100,000 the last bit of a frequency shows.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanovllm.errors import ModelLoadError
from nanovllm.layers.rope import rope_frequencies

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def scale(
    scaling: Mapping[str, Any],
    theta: float,
    head_dim: int,
    max_positions: int,
    original_positions: int,
) -> tuple[Tensor, float]:
    """The frequencies, in radians a position, and the factor of both cosine and sine.

    Args:
        scaling: "rope_type" and its parameters, as in config.json.
        max_positions: positions that sequences may reach.
        original_positions: max_position_embeddings of config.json.

    Returns:
        Frequencies [D/2], or [max_positions, D/2] where each position has its own; the factor.

    Raises:
        ModelLoadError: the kind is unknown, or a parameter is missing or impossible.
    """
    kind, frequencies = str(scaling["rope_type"]), rope_frequencies(theta, head_dim)
    original = scaling.get("original_max_position_embeddings") or original_positions
    try:
        if kind == "linear":
            # Position interpolation (Chen et al., 2023; also kaiokendev's SuperHOT).
            return frequencies / scaling["factor"], 1.0
        if kind == "dynamic":
            thetas = dynamic_thetas(
                theta, head_dim, scaling["factor"], max_positions, original_positions
            )
            return rope_frequencies(thetas[:, None], head_dim), 1.0
        if kind == "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            return llama3_frequencies(frequencies, scaling["factor"], low, high, original), 1.0
        if kind == "yarn":
            factor = scaling.get("factor") or original_positions / original
            return (
                yarn_frequencies(
                    theta,
                    head_dim,
                    factor,
                    scaling.get("beta_fast") or 32,
                    scaling.get("beta_slow") or 1,
                    original,
                    scaling.get("truncate", True),
                ),
                yarn_attention_factor(factor, scaling),
            )
    except KeyError as error:
        raise ModelLoadError(f"config.json: rope_type {kind!r} needs {error} beside it") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelLoadError(f"config.json: rope_type {kind!r}: {error}") from error
    raise ModelLoadError(
        f"config.json: rope_type {kind!r} is not supported; these are: {', '.join(KINDS)}"
    )


def dynamic_thetas(
    theta: float, head_dim: int, factor: float, max_positions: int, original: int
) -> Tensor:
    """A base for each position (dynamic NTK scaling; bloc97 and emozilla, 2023), [max_positions].

    The base grows with the length once that passes the original. Position p takes the base of the
    length p + 1, at which it is computed when tokens come one at a time, so a key does not depend
    on the rest of its batch or on how a prompt was cut into chunks.
    """
    lengths = torch.arange(1, max_positions + 1).clamp(min=original)
    growth = factor * lengths / original - (factor - 1)
    return theta * (growth.double() ** (head_dim / (head_dim - 2))).float()


def llama3_frequencies(
    frequencies: Tensor, factor: float, low: float, high: float, original: int
) -> Tensor:
    """Llama 3.1's scaling (Grattafiori et al., The Llama 3 Herd of Models, 2024).

    A rotation that turns less than `low` times in the original context is slowed by the factor,
    one that turns more than `high` times is not, and those between are mixed.
    """
    turns = original / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def yarn_frequencies(
    theta: float,
    head_dim: int,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original: int,
    truncate: bool,
) -> Tensor:
    """YaRN's "NTK by parts" (Peng et al., 2023, section 3.2).

    Of the pairs 0..D/2, those that turn more than `beta_fast` times in the original context are
    kept, those that turn less than `beta_slow` times are slowed by the factor, and a ramp lies
    between.
    """

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    frequencies = rope_frequencies(theta, head_dim)
    interpolated = rope_frequencies(theta, head_dim, factor)
    return interpolated * slowed + frequencies * (1 - slowed)


def yarn_attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    """YaRN's temperature (section 3.4), as a factor of cosine and sine. `mscale` and
    `mscale_all_dim` are DeepSeek's (DeepSeek-V2, 2024)."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all:
        return temperature(mscale) / temperature(mscale_all)
    return temperature(1)


def stretched_length(scaling: Mapping[str, Any], length: int) -> int:
    """Positions that sequences may reach, of a model whose max_position_embeddings is `length`.

    That is the length before linear and dynamic scaling, but the length after llama3's; for yarn
    it is found either way, so the original length is taken.
    """
    kind, factor = scaling["rope_type"], scaling.get("factor")
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings") or length
        return int(original * (factor or length / original))
    return int(length * (factor or 1)) if kind in ("linear", "dynamic") else length
