"""Weights that are not finite, or so large that the model leaves float32: bad input, no corruption."""

from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI
from reference_models import random_tensors, tiny_config, write

from spimpi.checks.recorder import KEPT_FAILURES, Recorder
from spimpi.errors import CorruptionError, UsageError
from spimpi.inference import finite
from spimpi.inference.checkpoint import open_checkpoint
from spimpi.trace.schema import Stage as Phase
from spimpi.trace.schema import Status, blank_events
from spimpi.verification import overflow
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import make_golden, verify_distributed_inference

FACTS = dict(
    vocab_size=256, hidden_size=24, intermediate_size=20, n_heads=6, n_kv_heads=2, head_dim=4
)  # fmt: skip
WEIGHTS = (
    "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight",
    "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight",
    "model.layers.1.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight",
)  # fmt: skip


def job_with(folder, name, values, whole=False):
    """A job of a small model in which an element, or the whole, of a tensor is changed."""
    config = tiny_config(**FACTS)
    tensors = random_tensors(config)
    changed = np.array(tensors[name])
    changed[... if whole else (7 if changed.ndim == 1 else (72, 7) if len(changed) > 72 else (3, 7))] = values
    write(folder, config, tensors | {name: changed})
    return prepare(Request(model=str(folder), prompts=("Hello",), tokens=2), 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_finite_are_bad_input_by_name(tmp_path, name, value):
    job = job_with(tmp_path, name, value)
    with pytest.raises(UsageError, match=rf"{name} holds (nan|-?inf) in element \["):
        make_golden(job)
    with pytest.raises(UsageError, match=name):
        verify_distributed_inference(MPI.COMM_SELF, job)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_huge_weight_runs_or_is_named(tmp_path, name):
    job = job_with(tmp_path, name, 3.39e38)
    try:
        outcome = verify_distributed_inference(MPI.COMM_SELF, job)
    except UsageError as error:
        assert "leaves float32" in str(error) and f"3.39e+38, in {name}" in str(error)
    else:
        assert outcome.exit_status == 0


@pytest.mark.parametrize("value", [1e-45, -1e-45, 1e-38, 0.0, -0.0])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_subnormal_weights_and_zeros_run(tmp_path, name, value):
    job = job_with(tmp_path, name, value, whole=True)
    assert verify_distributed_inference(MPI.COMM_SELF, job).exit_status == 0


def test_without_a_golden_run_an_overflow_is_no_corruption_either(tmp_path, monkeypatch):
    monkeypatch.setattr("spimpi.verification.run.GOLDEN_BYTES", 0)
    job = job_with(tmp_path, "model.layers.1.self_attn.q_proj.weight", 3.39e38, whole=True)
    with pytest.raises(UsageError, match="leaves float32 at step 0, layer 1.*a golden run would tell"):
        verify_distributed_inference(MPI.COMM_SELF, job)


def test_an_overflow_that_does_not_come_twice_is_corruption(tmp_path, monkeypatch):
    job = job_with(tmp_path, "model.layers.1.self_attn.q_proj.weight", 3.39e38, whole=True)
    monkeypatch.setattr(overflow, "same_twice", lambda recorder: False)
    with pytest.raises(CorruptionError, match="in the golden run, on rank 0 alone"):
        make_golden(job)


def test_nan_where_the_golden_run_has_none_is_corruption(tmp_path, monkeypatch):
    from spimpi.inference.model import Stage

    job = job_with(tmp_path, "model.norm.weight", 1.0)
    made = make_golden(job)
    run = Stage.run

    def breaks(self, *args, **more):
        self.part.layers[1].attn_norm[3] = np.nan
        return run(self, *args, **more)

    monkeypatch.setattr(Stage, "run", breaks)
    outcome = verify_distributed_inference(MPI.COMM_SELF, replace(job, golden=made))
    assert outcome.exit_status == 1


@pytest.mark.parametrize(
    ("changes", "is_own"),
    [({}, True), ({"fingerprint": 8}, False), ({"nonfinite": 0}, False), (None, False)],
)
def test_only_rows_that_are_not_finite_with_right_bits_are_the_model_s_own(changes, is_own):
    failures = blank_events(0 if changes is None else 3)
    failures["nonfinite"], failures["fingerprint"], failures["expected"] = 2, 7, 7
    for column, value in (changes or {}).items():
        failures[column][1] = value
    failures["verdict"], failures["stage"] = Status.FAILED, Phase.COMPUTE
    recorder = Recorder({"attn": 0})
    recorder.add(failures, {})
    assert overflow.only_overflow(MPI.COMM_SELF, recorder) == is_own


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_first_that_is_not_finite_is_found_in_any_block(dtype, monkeypatch):
    import ml_dtypes

    monkeypatch.setattr(finite, "_BLOCK", 8)
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    array = np.full((5, 7), ml_dtypes.finfo(kind).max, kind)
    assert finite.first_not_finite(array) == -1
    array[4, 6] = array[2, 3] = np.inf
    assert finite.first_not_finite(array) == 2 * 7 + 3
    array[2, 3] = -array[0, 0]
    assert finite.first_not_finite(array) == 34


def test_the_largest_weight_is_looked_for_up_to_a_layer(tmp_path):
    config = tiny_config(**FACTS)
    tensors = random_tensors(config)
    tensors["model.layers.0.mlp.up_proj.weight"][2, 3] = -50
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = 70
    write(tmp_path, config, tensors)
    checkpoint = open_checkpoint(tmp_path, config)
    assert finite.largest_weight(checkpoint, 0) == ("model.layers.0.mlp.up_proj.weight", 50)
    assert finite.largest_weight(checkpoint, -1) == ("model.layers.1.mlp.up_proj.weight", 70)


def many_failures(recorder, n, repeat, differs=False, at_once=100):
    """``n`` rows with NaN that are as they were made; the last one may differ."""
    for start in range(0, n, at_once):
        events = blank_events(min(at_once, n - start))
        events["verdict"], events["nonfinite"], events["repeat"] = Status.FAILED, 1, repeat
        events["stage"], events["step"] = Phase.COMPUTE, np.arange(start, start + len(events))
        events["expected"][-1] = differs and start + at_once >= n
        recorder.add(events, {})
        recorder.write_down()


@pytest.mark.parametrize("differs", [False, True])
def test_one_mismatch_behind_thousands_of_rows_with_nan_is_no_overflow(differs):
    recorder = Recorder({"attn": 0})
    many_failures(recorder, 3 * KEPT_FAILURES, 0, differs)
    assert overflow.only_overflow(MPI.COMM_SELF, recorder) == (not differs)


@pytest.mark.parametrize("missing", [0, 1])
def test_thousands_of_failures_come_twice_alike_whenever_they_were_written_down(missing):
    recorder = Recorder({"attn": 0})
    recorder.most_kept = np.inf
    many_failures(recorder, 2 * KEPT_FAILURES, 0)
    many_failures(recorder, 2 * KEPT_FAILURES - missing, 1, at_once=330)
    assert overflow.same_twice(recorder) == (not missing)
