"""``spimpi trace diff`` on real runs: what it finds, says, and refuses."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from trace_samples import some_events, write_alone_trace

import spimpi.trace
from spimpi.cli import main
from spimpi.trace.analysis.diff import diff
from spimpi.trace.journals.journal import Journal
from spimpi.trace.journals.journal_files import journal_folder
from spimpi.trace.schema import Op, Stage, Status
from spimpi.trace.sealing.recover import recover

PAGE = (Path(__file__).parents[2] / "docs" / "trace-diff.md").read_text()
SIX = ["--topology", "tp=3,pp=2"]
FLIP = ["--topology", "tp=3", "--inject", "bitflip:rank=2,step=2,layer=1,tensor=attn,bit=29"]
FLIP_ALONE = ["--inject", "bitflip:rank=0,step=2,layer=1,tensor=attn,bit=29"]
BLAS = ["--arith", "blas"]


def compare(capfd, a, b) -> tuple[int, str]:
    capfd.readouterr()
    status = main(["trace", "diff", str(a), str(b)])
    said = capfd.readouterr()
    return status, said.out + said.err


@pytest.fixture
def one_rank(traced):
    return traced("one", 1, "--sketch")


@pytest.fixture
def blas(traced):
    return traced("blas", 1, "--sketch", *BLAS)


def test_one_rank_and_six_have_the_same_bits(traced, one_rank, capfd):
    status, text = compare(capfd, one_rank, traced("six", 6, "--sketch", *SIX))
    assert status == 0
    # The weights, and embed, five tensors of eight layers, logits, tokens of four steps.
    verdict = f"SAME: {75 + 4 * (1 + 5 * 8 + 2)} tensors have the same bits"
    assert verdict in text and verdict in PAGE


def test_where_nothing_is_intact_nothing_is_called_the_same(tmp_path, capfd):
    write_alone_trace(tmp_path / "a.h5", [some_events(5)])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["events/bytes"][3] = 1
    status, text = compare(capfd, tmp_path / "a.h5", tmp_path / "a.h5")
    assert status == 3 and "altered" in text and "the same" not in text
    assert text.splitlines()[-1] == "INCOMPLETE: no tensor could be compared"


def test_a_planted_flip_is_found_by_step_layer_and_tensor(traced, one_rank, capfd):
    flipped = traced("flipped", 3, "--sketch", *FLIP)
    for pair in ((one_rank, flipped), (flipped, one_rank)):
        status, text = compare(capfd, *pair)
        name = "B" if pair[1] == flipped else "A"
        assert status == 1
        assert "first difference: step 2, layer 1, attn: A " in text
        assert f"it changed in {name}'s memory" in text
        assert f"{name}'s own checks failed there: at rest on rank 2" in text
        # The weights, two whole steps, embed, layer 0 and layer 1's qkv.
        assert f"before it {75 + 2 * 43 + 1 + 5 + 1} tensors are equal" in text


def test_exact_against_blas_is_reordered_rounding_with_its_size(one_rank, blas, capfd):
    status, text = compare(capfd, one_rank, blas)
    assert status == 1
    assert "first difference: step 0, layer 0, qkv" in text
    assert "reordered rounding (relative " in text and "jump" not in text
    with spimpi.trace.open(one_rank) as a, spimpi.trace.open(blas) as b:
        found = diff(a, b)
    assert 1e-8 < found.judgement.relative < 1e-5 < found.judgement.limit < 1e-3
    sizes = found.table["relative"][found.table["differs"]]
    assert len(sizes) == found.n_differ and (sizes < 1e-3).all()


def test_blas_on_one_rank_against_three_is_reordered_rounding(traced, blas, capfd):
    status, text = compare(capfd, blas, traced("blas of three", 3, "--sketch", *BLAS))
    assert status == 1
    assert "reordered rounding (relative " in text and "jump" not in text


def test_a_flip_between_two_blas_runs_is_found(traced, blas, capfd):
    flipped = traced("blas flipped", 1, "--sketch", *BLAS, *FLIP_ALONE)
    status, text = compare(capfd, blas, flipped)
    assert status == 1
    assert "first difference: step 2, layer 1, attn" in text and "\n  different (relative " in text
    assert "B's own checks failed there: at rest on rank 0" in text


def test_a_flip_in_a_blas_run_shows_as_a_jump_against_an_exact_run(traced, one_rank, capfd):
    flipped = traced("blas flipped", 1, "--sketch", *BLAS, *FLIP_ALONE)
    status, text = compare(capfd, one_rank, flipped)
    assert status == 1
    assert "first difference: step 0, layer 0, qkv" in text and "reordered rounding" in text
    assert "jump: step 2, layer 1, attn: relative " in text
    assert text.splitlines()[-1].endswith("; a jump at step 2, layer 1, attn")


def test_weights_that_differ_come_first(traced, one_rank, capfd):
    fault = "bitflip:rank=0,layer=2,tensor=v_proj,bit=3"
    status, text = compare(capfd, one_rank, traced("weights", 1, "--inject", fault))
    assert status == 1
    assert "first difference: the weights, model.layers.2.self_attn.v_proj.weight: A " in text
    assert "\n  different\n  weights are as they were read: nothing rounds\n" in text


def test_a_difference_that_comes_from_no_failed_check_is_found(traced, one_rank, capfd, tmp_path):
    """The row of one tensor altered in a copy: no check of the copy's run says anything."""
    path = tmp_path / "altered.h5"
    with spimpi.trace.open(one_rank) as trace:
        events = trace.events()
        hidden = [t.name for t in trace.tensors].index("hidden")
        row = np.flatnonzero(
            (events["stage"] == Stage.GOLDEN) & (events["step"] == 1) & (events["layer"] == 6)
            & (events["tensor"] == hidden)
        )  # fmt: skip
        events["fingerprint"][row] ^= np.uint64(1)
        unfinished(path, trace, [events], end_state="verified")
    status, text = compare(capfd, one_rank, path)
    assert status == 1 and "first difference: step 1, layer 6, hidden" in text
    assert "exact-1, whose bits no order of the sums changes" in text
    assert "after it 0 of" in text and "own checks" not in text


def unfinished(path, trace, rows, end_state=None) -> None:
    """Journals as a killed run leaves them: these rows of its ranks."""
    header = {k: v for k, v in trace.attributes.items() if k not in ("end_state", "sketches")}
    for rank, events in enumerate(rows):
        journal = Journal(journal_folder(path), rank, header, trace.tensors)
        journal.append(events)
        if end_state:
            journal.close(end_state)
        else:
            journal.flush()
            journal._file.close()  # as the kernel does: its lock is gone


@pytest.mark.parametrize("topology", ["one", "six"])
def test_of_a_killed_run_the_steps_that_it_flushed_are_compared(
    traced, one_rank, capfd, tmp_path, topology
):
    """Its fingerprints of whole tensors, never written, come from its checks at rest."""
    source = one_rank if topology == "one" else traced("six", 6, "--sketch", *SIX)
    path, broken = tmp_path / "killed.h5", tmp_path / "broken.h5"
    with spimpi.trace.open(source) as trace:
        ranks = [trace.events(rank.rank) for rank in trace.ranks]
        kept = [e[(e["stage"] != Stage.GOLDEN) & (e["step"] < 3)] for e in ranks]
        # The last rank's last step did not get to its journal.
        kept[-1] = kept[-1][kept[-1]["step"] < 2]
        unfinished(path, trace, kept)
        attn = [t.name for t in trace.tensors].index("attn")
        at_rest = (kept[0]["op"] == Op.AT_REST) & (kept[0]["tensor"] == attn)
        row = np.flatnonzero(at_rest & (kept[0]["layer"] == 1) & (kept[0]["step"] == 1))[0]
        for name in ("fingerprint", "expected"):
            kept[0][name][row] ^= np.uint64(4)
        unfinished(broken, trace, kept)
    status, text = compare(capfd, one_rank, path)
    assert status == 3 and "INCOMPLETE" in text and "was never sealed" in text
    if topology == "one":
        assert f"the {75 + 2 * 43} tensors that could be compared" in text
    status, text = compare(capfd, one_rank, broken)
    assert status == 1 and "first difference: step 1, layer 1, attn" in text
    for killed in (path, broken):
        with spimpi.trace.open(one_rank) as a, spimpi.trace.open(killed) as b:
            before = diff(a, b).table[["a", "b"]].tolist()
        recover(killed)
        with spimpi.trace.open(one_rank) as a, spimpi.trace.open(killed) as b:
            assert b.driver == "gather"
            assert diff(a, b).table[["a", "b"]].tolist() == before


def test_runs_of_different_length_are_compared_where_both_have_steps(traced, one_rank, capfd):
    shorter = traced("shorter", 1, "--tokens", 2, "--repeat", 2)
    status, text = compare(capfd, one_rank, shorter)
    assert status == 3 and "SAME" not in text
    assert "A has 4 steps, B 4: the 2 that both have are compared" in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("seed", 3, "is of seed 1069, {} of 3"), ("prompts_digest", "0f", "of prompts {1}"),
     ("prompts", 9, "is of prompts 8 prompts, {} of 9 prompts"),
     ("identity", "0123456789abcdef", "of tiny (0123456789abcdef)"),
     ("model", None, "{} of a program: nothing is in both")],
)  # fmt: skip
def test_other_runs_are_refused(one_rank, capfd, tmp_path, name, value, words):
    with spimpi.trace.open(one_rank) as trace:
        first = trace.attributes[name]
        if name == "prompts":
            del trace.attributes["prompts_digest"]  # as traces were before it
        trace.attributes[name] = value
        trace.attributes = {k: v for k, v in trace.attributes.items() if v is not None}
        unfinished(tmp_path / "other.h5", trace, [trace.events()])
    status, text = compare(capfd, one_rank, tmp_path / "other.h5")
    assert status == 2 and words.format(tmp_path / "other.h5", first) in text
    assert len(text.splitlines()) == 1


def test_what_is_no_trace_is_refused(one_rank, capfd, tmp_path):
    (tmp_path / "text").write_text("no trace")
    journal_folder(tmp_path / "empty.h5").mkdir()
    status, text = compare(capfd, one_rank, tmp_path / "empty.h5")
    assert status == 3 and "no journal whose header can be read" in text
    for other in ("text", "absent.h5"):
        for pair in ((one_rank, tmp_path / other), (tmp_path / other, one_rank)):
            status, text = compare(capfd, *pair)
            assert status == 2 and other in text and len(text.splitlines()) == 1


def test_a_run_that_goes_on_is_refused(one_rank, capfd, tmp_path):
    with spimpi.trace.open(one_rank) as trace:
        header = {"run_id": "on"} | {"model": trace.attributes["model"]}
        journal = Journal(journal_folder(tmp_path / "on.h5"), 0, header, trace.tensors)
    status, text = compare(capfd, one_rank, tmp_path / "on.h5")
    journal.close("verified")
    assert status == 2 and "still being written" in text and len(text.splitlines()) == 1


def test_json_has_all_that_differs(traced, one_rank, capfd):
    flipped = traced("flipped", 3, "--sketch", *FLIP)
    capfd.readouterr()
    assert main(["trace", "diff", "--json", str(one_rank), str(flipped)]) == 1
    found = json.loads(capfd.readouterr().out)
    first = found["first"]
    assert (first["step"], first["layer"], first["tensor"]) == (2, 1, "attn")
    assert first["a"] != first["b"] and first == found["differing"][0]
    assert len(found["differing"]) == found["differ"] == sum(l["differ"] for l in found["layers"])
    assert sum(line["compared"] for line in found["layers"]) == found["compared"]
    assert found["b"]["failure"]["tensor"] == "attn" and found["a"]["failure"] is None
    assert found["judgement"]["verdict"] == "different" and found["exit_status"] == 1


def test_a_traced_run_records_its_tensors_where_nothing_is_expected(traced, blas, capfd):
    """They are no checks: what the run counts and concludes is as without them."""
    with spimpi.trace.open(blas) as trace:
        events = trace.events()
        table = events[events["stage"] == Stage.GOLDEN]
        assert trace.attributes["end_state"] == "verified"
    assert len(table) == 4 * 43 and (table["verdict"] == Status.NOT_ESTABLISHED).all()
    assert not table["established"].any() and not table["expected"].any()
    assert table["fingerprint"].all() and (events["op"][events["stage"] == 6] == Op.CONTENT).all()
    assert main(["trace", "show", str(blas)]) == 0
    assert f"VERIFIED: {len(events) - len(table)} checks held" in capfd.readouterr().out


PROGRAM = """
import sys
import numpy as np
from mpi4py import MPI
import spimpi
comm, planted = MPI.COMM_WORLD, int(sys.argv[2])
part = spimpi.TensorPartition(0, comm.size, comm.rank, 6)
with spimpi.DistributedContext(comm, trace=sys.argv[1]) as ctx:
    for step in range(3):
        x = np.arange(60, dtype=np.float32).reshape(6, 10) + step
        x[4, 7] -= step == planted
        tag = spimpi.Tag(name="hidden", layer=3, step=step)
        mine = np.array_split(x, comm.size)[comm.rank].copy()
        for _ in range(2):
            spimpi.verify_allgather(comm, mine, x, part, tag, ctx=ctx)
        spimpi.verify_allreduce(comm, x, comm.size * x, spimpi.Tag(name="sum"), ctx=ctx)
"""


def test_programs_are_compared_by_the_checks_of_whole_tensors(tmp_path, run_ranks, capfd):
    """A float sum's bits depend on how many ranks add, and these are of other addends."""
    program, paths = tmp_path / "program.py", []
    program.write_text(PROGRAM)
    for n, planted in ((1, -1), (3, -1), (1, 1)):
        paths.append(tmp_path / f"{n}-{planted}.h5")
        done = run_ranks(n, program, paths[-1], planted)
        assert done.returncode == 0, done.stderr
    status, text = compare(capfd, paths[0], paths[1])
    assert status == 3 and "SAME" not in text
    assert "3 not compared (allreduce sum): sums of floats" in text
    same = "the 6 tensors that could be compared are the same, but not all was compared (above)"
    assert text.splitlines()[-1] == f"INCOMPLETE: {same}"
    status, text = compare(capfd, paths[1], paths[2])
    assert status == 1 and "first difference: step 1, layer 3, hidden (allgather): A " in text
    first = "the first: step 1, layer 3, hidden (allgather), of unknown size"
    assert text.splitlines()[-1] == f"DIFFERENT: 2 of 6 tensors differ; {first}"
