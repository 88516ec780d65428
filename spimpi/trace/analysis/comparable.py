"""Whether the fingerprints that two runs have at one place say the same of their data.

A difference between them is one of the data only where they are of the same thing whatever the
number of ranks. Where they are not, equal ones still say that the data are equal; of others
nothing is known, which is told. docs/trace-diff.md.
"""

from dataclasses import dataclass

import numpy as np

from spimpi.trace.analysis.contents import SHARED
from spimpi.trace.journals.growing import OTHERS
from spimpi.trace.names import member, name_of
from spimpi.trace.schema import HELD_BY_ONE, Op, Stage

SUMS = (Op.ALLREDUCE_SUM, Op.REDUCE_SCATTER)
# Their fingerprint is of the result, which other addends or factors may give too.
RESULTS = (
    *SUMS, Op.ALLREDUCE_MAX, Op.ALLREDUCE_MIN, Op.ALLREDUCE_BOR, Op.ALLREDUCE_BXOR, Op.MATMUL,
)  # fmt: skip
INTEGERS = ("int", "uint", "bool")  # dtypes whose sums no order changes

NOTHING, NO_WORD, LACKING, ONE_RANK, ROUNDED, BLOCKS, GROUPS = range(7)  # what keeps from it
REASONS = {
    NO_WORD: "without a fingerprint in one of the traces",
    LACKING: "of which a trace lacks some ranks",
    ONE_RANK: "of what one rank holds, which another split changes",
    ROUNDED: "sums of floats, whose last bits depend on how many ranks add",
    BLOCKS: "blocks of ranks, of which there are other numbers",
    GROUPS: "different from group to group of ranks, and nothing tells which group is which",
}
ALIKE, OTHER, SEVERAL, UNTOLD = range(4)  # what two traces say of the dtypes of one name


@dataclass(frozen=True)
class Runs:
    """What of two traces decides what can be compared. ``alike``: the ranks of both have the same
    part in the program; ``complete``: nothing is missing in either."""

    alike: bool
    complete: bool


def runs_of(a, b) -> Runs:
    """Of two open traces, of which all rows were read."""
    worlds = [(len(t.ranks), t.attributes.get("topology")) for t in (a, b)]
    return Runs(worlds[0] == worlds[1], not a.problems and not b.problems)


def compared(a, b, tensors, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """(which differ, NOTHING or what keeps from comparing) of rows of dtype CONTENT,
    paired. ``tensors``: the table that they refer to, with -1 where the runs' shapes differ."""
    op = a["op"]
    program = a["stage"] == Stage.PROGRAM
    same = (a["fingerprint"] == b["fingerprint"]) & (a["values"] == b["values"])
    several = np.maximum(a["values"], b["values"]) > 1
    why = np.full(len(a), NOTHING)
    if runs.alike:
        differs = ~same | (several & (a["assigned"] != b["assigned"]))
    else:
        # One value a group, and as many groups: the groups of both can be told by their order.
        told = (a["groups"] == a["values"]) & (b["groups"] == b["values"])
        unsure = same & several & ~(told & (a["ordered"] == b["ordered"]))
        differs = ~same
        loose = np.array([-1 in t.shape for t in tensors] + [True])[a["tensor"]]
        rounding = np.array([rounds(t.dtype) for t in tensors])
        why[program & unsure] = GROUPS
        why[program & differs & loose & np.isin(op, SHARED)] = BLOCKS
        why[program & differs & rounding[a["tensor"]] & np.isin(op, SUMS)] = ROUNDED
        why[program & differs & np.isin(op, HELD_BY_ONE)] = ONE_RANK
    if not runs.complete:
        spread = several | np.isin(op, (*SHARED, *HELD_BY_ONE))
        lacks = (a["rows"] != b["rows"]) | (not runs.alike)
        why[program & differs & spread & lacks] = LACKING
    why[(a["values"] == 0) | (b["values"] == 0)] = NO_WORD
    return differs & (why == NOTHING), why


def rounds(dtype: str) -> bool:
    """Whether sums of this dtype round; an exact sum tells none."""
    return bool(dtype) and not dtype.startswith(INTEGERS)


def told(rows, why) -> list[str]:
    """What was not compared, in words: how many, of which checks, the reason."""
    lines = []
    for reason, text in REASONS.items():
        ops = rows["op"][why == reason]
        if ops.size:
            lines.append(f"{ops.size:,} not compared ({_names(ops)}): {text}")
    return lines


def dtypes_of(a, b, names) -> np.ndarray:
    """What the tables of two open traces say of the dtypes of these tensors."""
    of_a, of_b = ({tensor.name: tensor.dtype for tensor in trace.tensors} for trace in (a, b))
    return np.array([_dtypes(of_a.get(name, ""), of_b.get(name, "")) for name in names], np.uint8)


def _dtypes(a: str, b: str) -> int:
    mixed = OTHERS.dtype
    if not a or not b or a == b == mixed:
        return UNTOLD
    return ALIKE if a == b else SEVERAL if mixed in (a, b) else OTHER


def told_dtypes(rows, dtypes) -> list[str]:
    """Of which compared rows the dtypes could not be, in words; ``dtypes``: those of the rows."""
    ops = rows["op"][(rows["stage"] == Stage.PROGRAM) & (dtypes == SEVERAL)]
    if not ops.size:
        return []
    why = "one of the traces has several under one name"
    return [f"{ops.size:,} whose dtypes are not compared ({_names(ops)}): {why}"]


def remarks(rows, dtypes) -> list[str]:
    """What of the compared rows the fingerprints do not tell, in words."""
    program, lines = rows["stage"] == Stage.PROGRAM, []
    ops = rows["op"][program & np.isin(rows["op"], RESULTS)]
    if ops.size:
        of = f"of sums and products ({_names(ops)})"
        lines.append(f"{of} the results alone were compared, not the inputs")
    ops = rows["op"][program & (dtypes == UNTOLD)]
    if ops.size:
        of = f"of {ops.size:,} checks ({_names(ops)})"
        lines.append(f"{of} the bits alone were compared: the traces tell no single dtype")
    return lines


def _names(ops) -> str:
    return ", ".join(name_of(member(Op, op)) for op in np.unique(ops).tolist())
