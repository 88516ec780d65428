"""The doctor on real ranks: fit as it is, and the odd rank named where one is planted."""

import argparse
import copy
import json

import pytest

from spimpi.cli import doctor
from spimpi.inference import elementary

ARGUMENTS = argparse.Namespace(json=True, expect_ranks=None)


@pytest.fixture
def four_ranks():
    from mpi4py import MPI

    facts = doctor.rank_facts(MPI.COMM_SELF)
    return [copy.deepcopy(facts) | {"rank": rank, "host": f"n{rank // 2}"} for rank in range(4)]


def test_equal_ranks_are_fit(four_ranks):
    assert doctor.findings(four_ranks) == (0, [], [])


def test_a_rank_that_computes_otherwise_is_named_with_its_host(four_ranks):
    four_ranks[2]["digest"] = "0" * 16
    status, problems, _ = doctor.findings(four_ranks)
    assert status == 1
    assert len(problems) == 1 and problems[0].startswith("rank 2 on n1: digest")


def test_of_two_halves_that_compute_differently_all_are_named(four_ranks):
    for rank in (0, 3):
        four_ranks[rank]["digest"] = "0" * 16
    status, problems, _ = doctor.findings(four_ranks)
    assert status == 1 and len(problems) == 4


def test_flushed_denormals_are_a_fault_even_where_all_ranks_agree(four_ranks):
    for rank in four_ranks:
        rank["denormals"] = False
    assert doctor.findings(four_ranks)[0] == 1


def test_another_version_on_one_host_is_an_unfit_environment(four_ranks):
    four_ranks[3]["packages"]["numpy"] = "1.0"
    status, problems, _ = doctor.findings(four_ranks)
    assert status == 2 and problems[0].startswith("rank 3 on n1: package versions")


def test_a_missing_package_is_named_with_the_way_to_get_it(four_ranks):
    four_ranks[1]["packages"]["h5py"] = None
    assert "rank 1 on n0: not installed: pip install h5py" in doctor.findings(four_ranks)[1]


def test_a_cache_that_cannot_be_written_is_a_note_not_a_problem(four_ranks):
    four_ranks[0]["cache"]["problem"] = "its folder belongs to another user"
    status, problems, notes = doctor.findings(four_ranks)
    assert (status, problems) == (0, []) and "SPIMPI_CACHE_DIR" in notes[0]


@pytest.mark.mpi
@pytest.mark.wheels
def test_the_ranks_of_this_run_are_fit_and_reported_once(comm, capsys):
    assert doctor.run(ARGUMENTS) == 0
    out = capsys.readouterr().out
    if comm.rank == 0:
        assert [rank["rank"] for rank in json.loads(out)["ranks"]] == list(range(comm.size))
    else:
        assert out == ""


@pytest.mark.mpi(min_size=3)
@pytest.mark.wheels
def test_every_rank_learns_which_one_computes_otherwise(comm, capsys, monkeypatch):
    right = elementary.digest
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(elementary, "digest", lambda: right() ^ 1)
    assert doctor.run(ARGUMENTS) == 1
    if comm.rank == 0:
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        assert problem.startswith(f"rank {comm.size - 1} on ")
