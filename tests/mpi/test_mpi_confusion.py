"""The confusion matrix's trials on real ranks, and that its ranks in one process decide likewise."""

from dataclasses import replace

import numpy as np
import pytest

from spimpi.bench import confusion_ranks
from spimpi.bench.cases import ON_RANKS, WITH_MPI_ALONE, WRAPPING
from spimpi.bench.one_process import Ranks
from spimpi.bench.scenes import CLEAN, Scene
from spimpi.context import DistributedContext

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.mark.parametrize("case", ON_RANKS, ids=lambda case: case.name)
def test_ranks_in_one_process_decide_as_real_ranks_do(comm, case):
    faults = (*case.faults, CLEAN) if case is not WRAPPING else ("zeros for data", CLEAN)
    rng = np.random.default_rng(7)
    dtypes = case.dtypes * len(faults)
    scenes = [Scene(dtypes[i], comm.size, fault, rng, i) for i, fault in enumerate(faults)]
    calls = [case.trial(s) for s in scenes]
    ranks = Ranks(comm.size)
    if case in WITH_MPI_ALONE:
        expected = [s.fault == CLEAN for s in scenes]
    elif case.hold:
        expected = [case.hold([s], ranks)[0] for s in scenes]
    else:
        expected = [ranks.holds(*call, s.rounds) for call, s in zip(calls, scenes)]
    with DistributedContext(comm) as ctx:
        for (call, callers), s, holds in zip(calls, scenes, expected):
            if callers is None or comm.rank in callers:
                verdict = call(comm, ctx)
                assert verdict is None or not s.changed or bool(verdict) == holds, s.fault


def test_a_fault_is_counted_where_it_is_missed(comm, monkeypatch):
    case = replace(next(c for c in ON_RANKS if c.name == "verify_alltoall"), dtypes=("float32",))
    if comm.size not in (2, 3, 4):
        pytest.skip("groups of 2, 3 and 4 ranks")
    seen = confusion_ranks.measure(comm, (comm.size,), (case,))
    assert all(row[5] == 0 < row[6] for row in seen)
    monkeypatch.setattr("spimpi.checks.check.fingerprint", lambda *_: 0)
    blind = confusion_ranks.measure(comm, (comm.size,), (case,))
    assert all(row[5] == row[6] for row in blind if row[2] != CLEAN)
    assert all(row[5] == 0 for row in blind if row[2] == CLEAN)
