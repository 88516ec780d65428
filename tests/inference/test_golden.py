"""Golden files: round trip, refusals, and the one that ships with the embedded model."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from spimpi.checks.recorder import Recorder
from spimpi.errors import UsageError
from spimpi.inference import golden
from spimpi.inference.tensors import PROGRAM
from spimpi.trace.schema import Stage, Status
from spimpi.verification.job import Request, prepare
from spimpi.verification.run import make_golden


def small():
    return prepare(Request(prompts=("The file ", "If "), tokens=3), 1)


def test_the_shipped_golden_file_is_what_this_code_computes():
    shipped = golden.read(golden.EMBEDDED_GOLDEN)
    job = prepare(Request(tokens=5), 1)
    made = make_golden(replace(job, golden=None))
    assert golden.fits(shipped, job.workload)
    assert (made.table == shipped.table[:5]).all()
    assert (made.tokens == shipped.tokens[:, :5]).all()


def test_a_golden_file_reads_back_as_it_was_written(tmp_path):
    job = small()
    made = make_golden(job)
    golden.write(tmp_path / "g.h5", made)
    back = golden.read(tmp_path / "g.h5")
    assert (back.table == made.table).all() and (back.tokens == made.tokens).all()
    assert back.workload == made.workload
    golden.require_same(back, job.workload)
    before = (tmp_path / "g.h5").read_bytes()
    with pytest.raises(UsageError, match="exists.*--overwrite"):
        golden.write(tmp_path / "g.h5", made)
    assert (tmp_path / "g.h5").read_bytes() == before
    golden.write(tmp_path / "g.h5", replace(made, tokens=made.tokens + 1), overwrite=True)
    assert (golden.read(tmp_path / "g.h5").tokens == made.tokens + 1).all()
    assert [p.name for p in tmp_path.iterdir()] == ["g.h5"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (dict(prompts=("Another ",)), "prompts"),
        (dict(seed=7), "seed"),
        (dict(tokens=4), "--tokens 3"),
    ],
)
def test_a_golden_run_of_something_else_is_refused(change, word, tmp_path):
    golden.write(tmp_path / "g.h5", make_golden(small()))
    asked = dict(prompts=("The file ", "If "), tokens=3) | change
    with pytest.raises(UsageError, match=word):
        prepare(Request(golden=str(tmp_path / "g.h5"), **asked), 1)


def test_every_changed_word_of_a_table_is_found():
    job = small()
    made = make_golden(job)

    class Events:
        failed = 0

        def one(self, *args, **kwargs):
            self.failed += args[6]

    for step, column in ((0, 0), (1, 20), (2, made.table.shape[1] - 1)):
        table = made.table.copy()
        table[step, column] ^= np.uint64(1)
        events = Events()
        assert golden.compare(table, made, events) == 1 == events.failed
    assert golden.compare(made.table, made, Events()) == 0


def test_a_table_is_recorded_at_its_places_and_is_no_check():
    table = np.arange(1, 1 + 3 * 13, dtype=np.uint64).reshape(3, 13)  # two layers
    recorder = Recorder({name: 10 + i for i, name in enumerate(PROGRAM)})
    kept = []
    recorder.journal = SimpleNamespace(append=kept.append, flush=lambda: None)
    golden.record(table, 2, recorder, repeat=4)
    recorder.write_down()
    (events,) = kept
    found = {(e["step"], e["layer"], PROGRAM[e["tensor"] - 10]): e["fingerprint"] for e in events}
    assert len(found) == 39 and set(events["repeat"]) == {4}
    assert found[0, -1, "embed"] == 1 and found[1, 1, "qkv"] == 13 + 7
    assert found[2, 1, "hidden"] == 2 * 13 + 11 and found[2, -1, "tokens"] == 39
    assert (events["verdict"] == Status.NOT_ESTABLISHED).all() and not events["expected"].any()
    assert recorder.n_events == recorder.totals[Stage.GOLDEN].checks == 0


def test_what_is_no_golden_file_is_refused(tmp_path):
    (tmp_path / "x.h5").write_bytes(b"no HDF5")
    for name in ("x.h5", "missing.h5"):
        with pytest.raises(UsageError, match=name):
            golden.read(tmp_path / name)
