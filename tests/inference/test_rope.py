"""The frequencies of rotary embeddings: the formulas, and the ways in which models stretch them."""

import numpy as np
import pytest
from reference_models import config_json, tiny_config

from spimpi.inference.config import Llama3Scaling, published
from spimpi.inference.rope import rope_factor, rope_inverse_frequencies, yarn_attention_factor


def ulps(a, b):
    return np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32)).max()


@pytest.mark.parametrize("head_dim", [2, 16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_frequencies_are_the_formula_rounded_once(head_dim, theta):
    config = tiny_config(head_dim=head_dim, rope_theta=theta)
    found = rope_inverse_frequencies(config)
    wanted = theta ** (-2 * np.arange(head_dim // 2) / head_dim)
    assert found.dtype == np.float32
    # float64's own pow is good to 1e-15: the same float32 but for the rare tie
    assert ulps(found, wanted.astype(np.float32)) <= 1
    assert np.abs(found / wanted - 1).max() < 2**-24 * 1.0001


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b"])
def test_rotary_frequencies_agree_with_transformers(name):
    pytest.importorskip("transformers", reason="transformers is the reference")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = published(name)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**config_json(config))).inv_freq.numpy()
    found = rope_inverse_frequencies(config)
    # how often each wave turns within the 8192 positions, before it is stretched
    i = np.arange(config.head_dim // 2)
    turns = 8192 * 500000.0 ** (-2 * i / config.head_dim) / (2 * np.pi)
    middle = (turns >= 1) & (turns <= 4)
    assert ulps(found[~middle], theirs[~middle]) <= 1
    # theirs is a chain of float32 operations here, whose differences lose bits; ours rounds once
    assert middle.any()
    assert ulps(found[middle], theirs[middle]) <= 6


def test_yarn_frequencies_agree_with_transformers_and_leave_sliding_layers_alone():
    pytest.importorskip("transformers", reason="transformers is the reference")
    from transformers import Olmo3Config
    from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

    config = published("olmo-3-7b")
    theirs = Olmo3RotaryEmbedding(Olmo3Config(**config_json(config)))
    found = rope_inverse_frequencies(config)
    stretched = theirs.full_attention_inv_freq.numpy()
    # theirs is a chain of float32 operations, whose differences lose bits where two are blended
    assert ulps(found, stretched) <= 8
    plain = rope_inverse_frequencies(config, sliding=True)
    assert ulps(plain, theirs.sliding_attention_inv_freq.numpy()) <= 1
    assert (found[:5] == plain[:5]).all()
    assert ulps(found[-1:], plain[-1:] / np.float32(8)) <= 1
    assert ((found > plain / 8.1) & (found <= plain)).all() and (np.diff(found) < 0).all()
    assert rope_factor(config) == np.float32(theirs.full_attention_attention_scaling)
    assert rope_factor(config, sliding=True) == 1 == theirs.sliding_attention_attention_scaling


def test_the_recommended_attention_factor_is_yarn_s():
    assert yarn_attention_factor(8.0) == 1.2079441541679836
    assert yarn_attention_factor(1.0) == 1


def test_llama3_stretches_long_waves_only():
    plain = rope_inverse_frequencies(tiny_config(head_dim=64, rope_theta=500000.0))
    scaling = Llama3Scaling(32.0, 1.0, 4.0, 8192)
    found = rope_inverse_frequencies(
        tiny_config(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    )
    # the rule in float64, as transformers writes it, from the unrounded frequencies
    exact = 500000.0 ** (-np.arange(32) / 32)
    wavelength = 2 * np.pi / exact
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    wanted = np.where(wavelength > 8192, exact / 32, exact)
    middle = (wavelength <= 8192) & (wavelength >= 2048)
    wanted = np.where(middle, (1 - smooth) * exact / 32 + smooth * exact, wanted)
    assert ulps(found, wanted.astype(np.float32)) <= 1
    assert (found[wavelength < 2048] == plain[wavelength < 2048]).all()
    assert middle.any() and (found[-1] != plain[-1])
