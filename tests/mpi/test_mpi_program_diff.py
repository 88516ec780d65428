"""``trace diff`` of two runs of a program: other data in any check, and they are not the same."""

import json
import warnings

import numpy as np
import pytest
from mpi4py import MPI
from planted import cut

import spimpi
import spimpi.trace
from spimpi import DistributedContext, Tag, TensorPartition
from spimpi.cli import main
from spimpi.trace.analysis.diff import diff
from spimpi.trace.schema import Op

pytestmark = [pytest.mark.mpi(min_size=2), pytest.mark.wheels]

WHOLE = {
    "allgather", "broadcast", "gather", "scatter", "alltoall", "isum", "max", "xor", "replicas",
    "rs", "colors",
}  # fmt: skip
FLOAT_SUMS = {"fsum", "frs", "exact"}
OF_RANKS = {"ring", "handoff", "rest", "matmul", "Send"}


def check_all(ctx, comm, other=()) -> None:
    """A check of each kind; those named in ``other`` see other data, all of them right."""
    n, r, ctx = comm.size, comm.rank, {"ctx": ctx}
    rows = TensorPartition(0, n, r, 12)

    def of(name, dtype=np.float32):
        return np.arange(12, dtype=dtype) + 100 * (name in other)

    def tag(name):
        return Tag(name=name, layer=2)

    x = of("allgather")
    spimpi.verify_allgather(comm, cut(x, rows), x, rows, tag("allgather"), **ctx)
    spimpi.verify_broadcast(comm, of("broadcast"), tag("broadcast"), **ctx)
    x = of("gather")
    spimpi.verify_gather(comm, cut(x, rows), x, rows, tag("gather"), **ctx)
    x = of("scatter")
    spimpi.verify_scatter(comm, x, cut(x, rows), rows, tag("scatter"), **ctx)
    x = of("alltoall")
    spimpi.verify_alltoall(comm, cut(x, rows), cut(x, rows), rows, rows, tag("alltoall"), **ctx)
    for name, dtype, verify in (
        ("isum", np.int64, spimpi.verify_allreduce), ("rs", np.int64, spimpi.verify_reduce_scatter),
        ("fsum", np.float32, spimpi.verify_allreduce),
        ("frs", np.float32, spimpi.verify_reduce_scatter),
    ):  # fmt: skip
        # The addends of one tensor, whatever the number of ranks.
        x = of(name, dtype) / 8 if dtype == np.float32 else of(name, dtype)
        own = x * (r == 0)
        if verify is spimpi.verify_reduce_scatter:
            verify(comm, own, cut(x, rows), rows, tag(name), **ctx)
        else:
            verify(comm, own, x, tag(name), **ctx)
    spimpi.verify_allreduce(comm, of("max"), of("max"), tag("max"), op=MPI.MAX, **ctx)
    x = of("xor", np.int64)
    own = x * (r == 0)
    spimpi.verify_allreduce(comm, own, x, tag("xor"), op=MPI.BXOR, **ctx)
    spimpi.verify_replicas(comm, of("replicas"), tag("replicas"), **ctx)
    spimpi.exact_allreduce(comm, of("exact") * (r == 0), tag=tag("exact"), **ctx)
    painted = np.empty(12, np.float32)
    spimpi.color_hidden_states(painted, tag("colors"))
    spimpi.verify_colors(comm, painted, tag("colors"), **ctx)
    x = of("ring") + r
    y = of("ring") + (r - 1) % n
    spimpi.verify_ring(comm, x, y, tag("ring"), **ctx)
    if n > 1 and r < 2:
        spimpi.verify_pipeline_handoff(comm, of("handoff"), 0, 1, tag("handoff"), **ctx)
    spimpi.at_rest(of("rest") + r, tag("rest")).verify(comm, **ctx)
    a, w = of("matmul").reshape(3, 4) + r, np.eye(4, dtype=np.float32)
    spimpi.verify_matmul(comm, a, w, a @ w, tag("matmul"), **ctx)
    checked = spimpi.checked(comm, ctx["ctx"])
    if n > 1:
        x = of("Send") + r
        checked.Sendrecv(x, (r + 1) % n, 0, np.empty_like(x), (r - 1) % n, 0)


@pytest.fixture
def traced(comm, shared_folder, request):
    """``traced(name, part, other=())``: the trace of ``check_all`` by the ranks of ``part``."""

    def run(name, part, other=(), checks=check_all):
        path = shared_folder / f"{request.node.name[:40]}-{name}.h5".replace("/", " ")
        if part != MPI.COMM_NULL:
            with DistributedContext(part, trace=path) as ctx:
                checks(ctx, part, other)
        comm.Barrier()
        return path

    return run


def compared(comm, a, b):
    """What diff finds, on every rank alike."""
    with spimpi.trace.open(a) as one, spimpi.trace.open(b) as two:
        found = diff(one, two)
    comm.Barrier()  # before rank 0 may take the folder away
    return found


def test_every_check_leaves_what_tells_other_data(comm, traced):
    clean = traced("clean", comm)
    found = compared(comm, clean, traced("again", comm))
    assert found.exit_status == 0, (found.notes, found.missing)
    names = {found.names[row["tensor"]] for row in found.table}
    assert names == WHOLE | FLOAT_SUMS | OF_RANKS
    for other in ({"gather"}, names - {"colors"}):  # painted data are what their tag says
        found = compared(comm, clean, traced(f"{len(other)} other", comm, other))
        differ = {found.names[row["tensor"]] for row in found.table[found.table["differs"]]}
        assert differ == other and found.exit_status == 1


def test_runs_of_other_numbers_of_ranks_are_compared_where_their_data_are_whole(comm, traced, capfd):
    alone = comm.Split(0 if comm.rank == 0 else MPI.UNDEFINED)
    one, all_ranks = traced("one", alone), traced("all", comm)
    found = compared(comm, one, all_ranks)
    assert found.exit_status == 3 and not found.n_differ
    names = {found.names[row["tensor"]] for row in found.table}
    # A sum that nothing rounds has the same bits here; the others are of other data.
    assert WHOLE | FLOAT_SUMS == names
    notes = "\n".join(found.notes)
    assert "(matmul, at rest): of what one rank holds" in notes
    assert "(ring): blocks of ranks" in notes and "tensors of common steps are in B alone" in notes
    other = compared(comm, one, traced("other", comm, WHOLE))
    differ = {other.names[row["tensor"]] for row in other.table[other.table["differs"]]}
    assert other.exit_status == 1 and differ == WHOLE - {"colors"}
    rounded = compared(comm, one, traced("rounded", comm, FLOAT_SUMS))
    assert rounded.exit_status == 3
    told = "3 not compared (allreduce sum, reduce scatter): sums of floats"
    assert told in "\n".join(rounded.notes)
    if comm.rank == 0:
        capfd.readouterr()
        assert main(["trace", "diff", str(one), str(all_ranks)]) == 3
        text = capfd.readouterr().out
        assert "SAME" not in text and text.splitlines()[-1].startswith("INCOMPLETE: the 1")
    comm.Barrier()
    if alone != MPI.COMM_NULL:
        alone.Free()


def in_groups(ctx, comm, turned) -> None:
    """Two groups of ranks with tensors of one name; ``turned``: each has the other's data."""
    color = comm.rank % 2
    with_data = color ^ bool(turned)
    group = comm.Split(color, comm.rank)
    x = np.arange(12, dtype=np.float32) + 50 * with_data
    rows = TensorPartition(0, group.size, group.rank, 12)
    spimpi.verify_replicas(group, x, Tag(name="replicas"), ctx=ctx)
    spimpi.verify_gather(group, cut(x, rows), x, rows, Tag(name="gather"), ctx=ctx)
    spimpi.verify_replicas(group, np.ones(3), Tag(name="alike"), ctx=ctx)
    group.Free()


def test_two_groups_that_exchanged_their_data_are_not_the_same(comm, traced, capfd):
    clean = traced("clean", comm, checks=in_groups)
    assert compared(comm, clean, traced("again", comm, checks=in_groups)).exit_status == 0
    turned = traced("turned", comm, {1}, checks=in_groups)
    found = compared(comm, clean, turned)
    differ = {found.names[row["tensor"]] for row in found.table[found.table["differs"]]}
    assert differ == {"replicas", "gather"} and found.exit_status == 1
    if comm.rank == 0:
        capfd.readouterr()
        assert main(["trace", "diff", str(clean), str(turned)]) == 1
        assert "their data were exchanged" in capfd.readouterr().out
    comm.Barrier()


@pytest.mark.mpi(min_size=3)
def test_groups_of_other_sizes_are_told_apart_by_their_order(comm, traced):
    two = comm.Split(0 if comm.rank < 2 else MPI.UNDEFINED)
    small, large = traced("two", two, checks=in_groups), traced("all", comm, checks=in_groups)
    found = compared(comm, small, large)
    assert found.exit_status == 0 and len(found.table) == 3, found.notes
    with spimpi.trace.open(large) as trace:
        events = trace.events()
        assert set(events["sequence"][events["op"] == Op.GATHER]) == {1, 2}
    comm.Barrier()
    found = compared(comm, small, traced("turned", comm, {1}, checks=in_groups))
    assert found.exit_status == 3 and not found.n_differ
    assert "nothing tells which group is which" in found.notes[0]
    if two != MPI.COMM_NULL:
        two.Free()


def passed_on(ctx, comm, other) -> None:
    """A checked call, and others that go on to the communicator, of other data."""
    checked, x, y = spimpi.checked(comm, ctx), np.arange(4.0) + bool(other), np.zeros(4)
    checked.Bcast(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checked.Allreduce(x, y, MPI.PROD)
        checked.Scan(x, y)
        checked.Scan(x, y)


def test_calls_that_no_check_looks_at_are_told_as_not_compared(comm, traced, capfd):
    clean, other = traced("clean", comm, checks=passed_on), traced("other", comm, {1}, passed_on)
    found = compared(comm, clean, other)
    assert found.exit_status == 3 and not found.n_differ
    calls = f"Allreduce by MPI.PROD ({comm.size}), Scan ({2 * comm.size})"
    notes = [f"calls of {name} that no check looked at: {calls}" for name in "AB"]
    assert list(found.notes) == notes
    if comm.rank == 0:
        capfd.readouterr()
        assert main(["trace", "diff", str(clean), str(other)]) == 3
        text = capfd.readouterr().out
        assert "SAME" not in text and text.splitlines()[-1].startswith("INCOMPLETE: the 1")
        assert main(["trace", "show", str(clean)]) == 0
        assert f'"Scan": {2 * comm.size}' in capfd.readouterr().out
    comm.Barrier()


def of_other_inputs(ctx, comm, other) -> None:
    """Sums and a product whose results are zeros, whatever was added and multiplied."""
    given, zeros = np.zeros(3), np.zeros(3)
    if other and comm.rank < 2:
        given += (-1.0) ** comm.rank
    spimpi.verify_allreduce(comm, given, zeros, Tag(name="sum"), ctx=ctx)
    spimpi.exact_allreduce(comm, given, tag=Tag(name="exact"), ctx=ctx)
    w = np.zeros((3, 2), int)
    spimpi.verify_matmul(comm, given[None], w, given[None] @ w, Tag(name="matmul"), ctx=ctx)
    spimpi.verify_replicas(comm, zeros, Tag(name="copies"), ctx=ctx)


def test_of_sums_and_products_it_says_that_the_results_alone_were_compared(comm, traced, capfd):
    clean = traced("clean", comm, checks=of_other_inputs)
    other = traced("other", comm, {1}, of_other_inputs)
    if comm.rank == 0:
        capfd.readouterr()
        assert main(["trace", "diff", str(clean), str(other)]) == 0
        *lines, last = capfd.readouterr().out.splitlines()
        assert last == "SAME: 4 tensors have the same bits"
        assert sum("(allreduce sum, matmul) the results alone" in line for line in lines) == 1
        assert main(["trace", "diff", "--json", str(clean), str(other)]) == 0
        first, second = json.loads(capfd.readouterr().out)["remarks"]
        assert "results alone" in first and "(matmul) the bits alone" in second
    comm.Barrier()


def of_dtype(ctx, comm, dtype) -> None:
    """Zeros, whose bits every dtype of one size has."""
    zeros = np.zeros(4, dtype)
    spimpi.verify_replicas(comm, zeros, Tag(name="copies"), ctx=ctx)
    if comm.rank < 2:
        other = np.empty_like(zeros)
        spimpi.checked(comm, ctx).Sendrecv(zeros, 1 - comm.rank, 0, other, 1 - comm.rank, 0)


def test_equal_bits_of_other_dtypes_are_a_difference(comm, traced, capfd):
    floats, integers = (traced(name, comm, name, of_dtype) for name in ("float32", "int32"))
    again = compared(comm, floats, traced("again", comm, "float32", of_dtype))
    assert again.exit_status == 0 and not again.remarks
    found = compared(comm, floats, integers)
    assert found.exit_status == 1 and found.n_differ == len(found.table) == 2
    if comm.rank == 0:
        capfd.readouterr()
        assert main(["trace", "diff", str(floats), str(integers)]) == 1
        assert "its dtype is float32 in A, int32 in B" in capfd.readouterr().out
    comm.Barrier()
