"""The rotary embedding's frequencies, in decimal arithmetic: the same on any machine.

pow, log and chains of float32 operations differ by machine, and golden files must not.
"""

import decimal
from decimal import Decimal

import numpy as np

_PI = Decimal("3.14159265358979323846264338327950288419716939937510")
_CONTEXT = decimal.Context(prec=50)


def rope_inverse_frequencies(config, sliding: bool = False) -> np.ndarray:
    """The rotary embedding's inverse frequencies, float32 [head_dim / 2], in radians a position.

    theta ** (-2i / head_dim), stretched by Llama 3's rule or YaRN's where the model has one
    (formulas: transformers, modeling_rope_utils), but not in ``sliding`` layers. Computed in 50
    decimal digits and rounded once. config: a ModelConfig.
    """
    with decimal.localcontext(_CONTEXT):
        theta, scaling = Decimal(config.rope_theta), config.rope_scaling
        exponents = (Decimal(-2 * i) / config.head_dim for i in range(config.head_dim // 2))
        frequencies = [theta**exponent for exponent in exponents]
        if scaling is not None and not sliding:
            if hasattr(scaling, "beta_fast"):
                frequencies = _yarn(frequencies, scaling, theta, config.head_dim)
            else:
                frequencies = [_llama3(f, scaling) for f in frequencies]
        return np.array([float(f) for f in frequencies], dtype=np.float32)


def rope_factor(config, sliding: bool = False) -> np.float32:
    """By what YaRN multiplies cosines and sines; 1 without it and in ``sliding`` layers."""
    scaling = None if sliding else config.rope_scaling
    return np.float32(getattr(scaling, "attention_factor", 1.0))


def yarn_attention_factor(factor: float) -> float:
    """What YaRN recommends for a stretch by ``factor``: 0.1 ln(factor) + 1 (Peng et al. 2023)."""
    with decimal.localcontext(_CONTEXT):
        return float(Decimal(factor).ln() / 10 + 1)


def _llama3(frequency: Decimal, scaling) -> Decimal:
    factor = Decimal(scaling.factor)
    low = Decimal(scaling.low_freq_factor)
    high = Decimal(scaling.high_freq_factor)
    # how often the wave turns within the context of the pre-training
    turns = scaling.original_max_position_embeddings * frequency / (2 * _PI)
    if turns > high:
        return frequency
    if turns < low:
        return frequency / factor
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(frequencies, scaling, theta: Decimal, head_dim: int) -> list[Decimal]:
    """Between those that turn beta_fast and beta_slow times, from kept to divided by factor."""

    def index_of(turns: float) -> Decimal:
        """The (fractional) index of the wave that turns so often in the pre-training's context."""
        longest = Decimal(scaling.original_max_position_embeddings)
        return head_dim * (longest / (Decimal(turns) * 2 * _PI)).ln() / (2 * theta.ln())

    low = max(index_of(scaling.beta_fast).to_integral_value(decimal.ROUND_FLOOR), Decimal(0))
    high = index_of(scaling.beta_slow).to_integral_value(decimal.ROUND_CEILING)
    high = min(high, Decimal(head_dim - 1))
    width = high - low if high != low else Decimal("0.001")
    factor, stretched = Decimal(scaling.factor), []
    for i, frequency in enumerate(frequencies):
        share = min(max((i - low) / width, Decimal(0)), Decimal(1))
        stretched.append(frequency * (1 - share) + frequency / factor * share)
    return stretched
