"""What a report says in sentences."""

from spimpi.trace.analysis.locate import Root

WRONG = {
    "agreement": "replicas do not hold the same bits",
    "matmul": "a product does not fit its inputs",
    "at rest": "data in memory changed between two readings",
    "content": "a tensor is not the one that was expected",
    "nonfinite": "NaN or Inf",
    "handoff": "what arrived is not what was sent",
    "message": "what arrived is not what was sent",
    "broadcast": "what arrived is not what was sent",
    "allgather": "what was gathered is not what the ranks gave",
    "gather": "what was gathered is not what the ranks gave",
    "scatter": "what arrived is not what was sent",
    "alltoall": "what arrived is not what was sent",
    "colours": "painted elements lost their colour",
}
VERDICTS = {
    "corrupted": ("CORRUPTED", "bad", "✕"),
    "incomplete": ("INCOMPLETE", "warn", "?"),
    "verified": ("VERIFIED", "good", "✓"),
}
DIFFERENT = ("DIFFERENT", "bad", "≠")


def few(names) -> str:
    """The first of them, and that there are more."""
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def origin(run) -> str:
    """Where a run was, and when it began."""
    return ", ".join(filter(None, (few(run.hosts), run.started)))


def verdict(run) -> str:
    """One sentence."""
    found = run.located
    n_ranks = f"{len(run.ranks):,} rank{'s' * (len(run.ranks) != 1)}"
    if found.n_failed:
        return f"{found.n_failed:,} of {found.n_checks:,} checks on {n_ranks} failed."
    if found.verdict == "corrupted":
        return "The run said so at its end; the rows of what failed are not here."
    if found.verdict == "incomplete":
        return f"No check failed among the {found.n_checks:,} that are here, but they are not all."
    return f"All {found.n_checks:,} checks on {n_ranks} held."


def place(failure) -> str:
    """Where a failure is: step 1, layer 2, tensor hidden."""
    if failure.stage in ("fabric", "weights"):
        where = f"{failure.stage}, {failure.tensor}"
    else:
        layer = f"layer {failure.layer}, " if failure.layer >= 0 else ""
        where = f"step {failure.step}, {layer}tensor {failure.tensor}"
    return where + (f", repetition {failure.repeat}" if failure.repeat else "")


def culprit(root: Root) -> str:
    """Who is at fault, as far as the checks tell."""
    hosts = f" (host {', '.join(root.hosts)})" if any(root.hosts) else ""
    if root.at_fault >= 0:
        return f"rank {root.at_fault}{hosts}"
    if root.suspects:
        ranks = " or ".join(map(str, root.suspects))
        return f"rank {ranks}{hosts}, the checks do not tell which"
    return f"not told by the checks; rank {root.failure.rank} recorded it"


def wrong(failure) -> str:
    """What is wrong, in words, with the check's name."""
    said = WRONG.get(failure.op)
    if said is None and failure.op.startswith(("allreduce", "reduce")):
        said = "the result is not that of what the ranks gave"
    return f"{said} ({failure.op})" if said else f"{failure.op} failed"


def consequences(found) -> str:
    """How much of the rest the roots explain."""
    if found.n_failed < 2:
        return ""
    if found.n_roots == 1 and not found.n_consequences and not found.unclassified:
        return "All failed checks saw the same."
    others = (
        "no other failure is independent of it"
        if found.n_roots == 1
        else f"{found.n_roots - 1:,} more went wrong independently of it"
    )
    said = f"{found.n_consequences:,} later failures can be consequences; {others}."
    if found.unclassified:
        said += f" {found.unclassified:,} further failures were not looked at."
    return said
