"""What the ranks tell each other when a merged record is not what clean checks give.

First the words of all ranks, then, for the first few checks at fault, what each rank gave: its
shapes and places, or its error. That tells a wrong call (UsageError, the same on every rank) from
corruption, whose rank and elements are then found (checks/blame.py, checks/localisation/) by
reading the blocks again: only where all of them still are what they were when the check was
made. Of buffers that were used again since, the words that were recorded then are all there is.
Everything here is collective over the session's ranks and runs only after a failure.
"""

from dataclasses import dataclass, replace

import numpy as np
from mpi4py import MPI

from spimpi.checks.blame import blamed, coverage_problem, findings
from spimpi.checks.check import HANDOFFS, Check, Rule
from spimpi.checks.coverage import holding
from spimpi.checks.localisation.findings import Findings
from spimpi.checks.verdict import Verdict, Where
from spimpi.errors import SpimpiError, UsageError
from spimpi.fingerprint.tag import MASK
from spimpi.partition import Slab
from spimpi.reduction import minority, same_kind
from spimpi.trace.schema import Established
from spimpi.units import ranks_text

LOCALISED = 3  # failing checks of a batch that are looked into
DIGEST, GIVEN, GOT, SIZE, N_BAD, ERROR, COMPARES = range(7)


@dataclass(frozen=True)
class Report:
    """What one rank says of its part in a check."""

    check: str
    tag: object
    dtype: str
    shape: tuple | None
    partition: object
    root: int | None
    settings: str
    host: str
    contributed: tuple[tuple[tuple, Slab], ...]
    held: tuple[tuple[tuple, Slab], ...]
    error: tuple | None
    complaint: dict | None
    is_reused: bool


def explain(session, checks) -> list[Verdict | None]:
    """A verdict for each check, or the UsageError that keeps one from being made.

    None for checks of Rule.GATHERED: their words follow.
    """
    comm = session.comm
    _require_same_number(comm, checks)
    own = np.zeros((len(checks), 7), np.uint64)
    for row, c in zip(own, checks):
        size, _ = c.size_words
        row[:] = [
            c.digest, c.given, c.got, size & MASK, c.n_bad,
            0 if c.error is None else 1 if c.yields else 2, bool(c.compares),
        ]  # fmt: skip
    everyone = np.empty((comm.size, *own.shape), np.uint64)
    comm.Allgather(own, everyone)
    verdicts, looked_into = [], 0
    for i, c in enumerate(checks):
        words = everyone[:, i]
        # Errors that yield are below others, and are no reason where a rank found a failure.
        refused = words[:, ERROR].max() > words[:, N_BAD].any()
        if refused or (words[:, DIGEST] != words[0, DIGEST]).any():
            _refuse(c, _reports(comm, c))
        if c.rule is Rule.GATHERED:
            verdicts.append(None)
            continue
        covered = int(words[:, SIZE].sum()) == c.size_words[1] & MASK
        if covered and _holds(c.rule, words):
            verdicts.append(holding(c, comm.size, bool(words[:, COMPARES].any())))
            continue
        looked_into += 1
        locate = looked_into <= LOCALISED or not covered
        verdicts.append(_failed(session, c, words, locate))
    return verdicts


def _holds(rule: Rule, words) -> bool:
    given, got = (np.bitwise_xor.reduce(words[:, column]) for column in (GIVEN, GOT))
    if rule is Rule.LOCAL:
        return not words[:, N_BAD].any()
    if rule is Rule.MOVED:
        return given == got
    same = (words[:, GOT] == words[0, GOT]).all()
    return same and (rule is Rule.AGREED or given == words[0, GOT])


def _require_same_number(comm, checks) -> None:
    number = np.empty(comm.size, np.int64)
    comm.Allgather(np.array([len(checks)], np.int64), number)
    if (number == number[0]).all():
        return
    # One of a batch is its own, for hand-offs (batch.py).
    titles = comm.allgather([_title(c) for c in checks if c.name != HANDOFFS])
    told = _grouped([len(t) for t in titles], lambda n: f"made {n} checks" if n != 1 else "made 1 check")
    shortest = min(map(len, titles))
    first = next((i for i in range(shortest) if len({t[i] for t in titles}) > 1), shortest)
    at = _grouped([t[first] if first < len(t) else "nothing" for t in titles], str)
    msg = f"all ranks must make the same checks in a batch: {told}; check {first + 1} is: {at}"
    raise UsageError(msg)


def _title(check) -> str:
    """Of a Check, or of a Report: 'allgather of hidden'."""
    name = getattr(check, "check", None) or check.name
    return f"{name} of {getattr(check.tag, 'name', check.tag)!r}"


def _reports(comm, c: Check) -> list[Report]:
    def places(blocks):
        return tuple((tuple(a.shape), slab) for a, slab in blocks)

    complaint = c.complaint() if c.complaint and c.n_bad and c.error is None else None
    report = Report(
        c.name, c.tag, c.dtype.name if c.dtype else "", c.shape, c.layout, c.root,
        c.settings, MPI.Get_processor_name(), places(c.contributed), places(c.held),
        c.error and (type(c.error), str(c.error)), complaint,
        c.error is None and c.rule is not Rule.GATHERED and not c.same_as_then(),
    )  # fmt: skip
    return comm.allgather(report)


def _refuse(c: Check, reports) -> None:
    """Raise the UsageError that errors, or differing opinions, of some ranks amount to."""
    failed = [r for r, report in enumerate(reports) if report.error]
    if failed:
        kind = reports[failed[0]].error[0]
        told = _grouped([r.error and r.error[1] for r in reports], str, ": ")
        raise same_kind(kind, f"{_title(reports[0])}: {told}") from c.error
    for field, words in (
        ("check", "called {}"), ("tag", "gave {}"), ("dtype", "gave dtype {}"),
        ("settings", "gave {}"), ("shape", "gave blocks of global shape {}"),
        ("root", "gave root {}"), ("partition", "gave the partition {}"),
    ):  # fmt: skip
        values = [getattr(r, field) for r in reports]
        if field == "dtype" and "" in values:  # of a sum by an operation that has no check
            continue
        if any(v != values[0] for v in values):
            msg = f"{_title(reports[0])}: ranks differ in {field}: {_grouped(values, words.format)}"
            raise UsageError(msg)
    title = _title(reports[0])
    msg = f"{title}: the ranks' digests differ, and nothing else: a record was corrupted"
    raise SpimpiError(msg)


def _grouped(values, words, between=" ") -> str:
    """'ranks 0, 2 gave float32; rank 1 gave float64': equal values together, None left out."""
    groups: dict = {}
    for rank, value in enumerate(values):
        if value is not None:
            groups.setdefault(repr(value), ([], value))[0].append(rank)
    return "; ".join(f"{ranks_text(r)}{between}{words(v)}" for r, v in groups.values())


def _failed(session, c: Check, words, locate: bool) -> Verdict:
    """The verdict of a check that fails; UsageError where the blocks do not cover the tensor."""
    if not locate:
        return _verdict(c, words, None, "", "not looked into: earlier checks failed")
    reports = _reports(session.comm, c)
    if c.rule is Rule.LOCAL:
        return _local_failure(c, words, reports)
    if c.rule is Rule.AGREED:
        return _disagreement(session, c, words, reports)
    problem = coverage_problem(reports, c.n_loose, c.rule is Rule.MOVED, c.shape)
    if problem:
        msg = f"{_title(c)}: {problem}"
        raise UsageError(msg)
    reused = [r for r, report in enumerate(reports) if report.is_reused]
    if reused:
        rank = _by_recorded_words(c, words)
        named = "" if rank is not None else ", nor is the rank"
        detail = f"{used_again(reused)}: which elements were wrong is not known{named}"
        return _verdict(c, words, rank, _host(reports, rank), detail)
    rank, who = blamed(session.comm, c, reports)
    found = findings(session.comm, c, reports, session.history)
    text = found.text if found else ""
    detail = "; ".join(part for part in (text, who) if part)
    return _verdict(c, words, rank, _host(reports, rank), detail, found)


def _by_recorded_words(c: Check, words) -> int | None:
    """The rank that alone holds another result than all contributions make; None where the words
    single out none."""
    if c.rule is not Rule.ASSEMBLED or len(words) == 2 and c.root is not None:
        return None
    odd = np.flatnonzero(words[:, GOT] != np.bitwise_xor.reduce(words[:, GIVEN]))
    return int(odd[0]) if odd.size == 1 else None


def used_again(ranks) -> str:
    """Why blocks are not read again."""
    return f"the buffers of {ranks_text(ranks)} have changed since the check was made"


def _local_failure(c, words, reports) -> Verdict:
    """Every rank's complaint is its own; the first one tells."""
    bad = [int(r) for r in np.flatnonzero(words[:, N_BAD])]
    first = bad[0]
    told = dict(reports[first].complaint)
    if "verdict" in told:
        return told["verdict"]
    more = [f"{ranks_text(bad[1:])} failed too"] if len(bad) > 1 else []
    told["detail"] = "; ".join([told["detail"], *more])
    # Its author knows only its own communicator's ranks by number, not its own.
    elements = tuple(replace(e, rank=first) for e in told.pop("elements", ()))
    found = Findings(elements, told.pop("n_wrong", None))
    return _verdict(c, words, first, reports[first].host, found=found, **told)


def _disagreement(session, c, words, reports) -> Verdict:
    odd = minority(words[:, GOT])
    if len(odd) == len(reports):
        text = f"{ranks_text(odd)} differ, and nothing tells which is right"
    else:
        text = f"{ranks_text(odd)} differ{'s' * (len(odd) == 1)} from the majority"
    truth = next((r for r in range(len(reports)) if r not in odd), 0)
    rank = odd[0] if len(odd) == 1 else None
    found, reused = None, [r for r, report in enumerate(reports) if report.is_reused]
    if reused:
        text += f"; {used_again(reused)}: which elements were wrong is not known"
    else:
        if session.rank == truth:
            c.contributed = c.held
        found = findings(session.comm, c, reports, session.history)
        text += f"; {found.text}" if found else ""
    expected, actual = int(words[truth, GOT]), int(words[next(r for r in odd if r != truth), GOT])
    return _verdict(c, words, rank, _host(reports, rank), text, found, expected, actual)


def _host(reports, rank) -> str:
    return "" if rank is None else reports[rank].host


def _verdict(
    c: Check, words, rank, host, detail, found=None, expected=None, actual=None
) -> Verdict:
    if expected is None and c.rule in (Rule.ASSEMBLED, Rule.MOVED):
        expected = int(np.bitwise_xor.reduce(words[:, GIVEN]))
        actual = int(np.bitwise_xor.reduce(words[:, GOT]))
        if c.rule is Rule.ASSEMBLED:
            wrong = np.flatnonzero(words[:, GOT] != np.uint64(expected))
            seen = rank if rank is not None and rank in wrong else wrong[0] if wrong.size else 0
            actual = int(words[seen, GOT])
    texts = ["" if word is None else f"{word:016x}" for word in (expected, actual)]
    where = Where(
        c.name, c.tag.name, c.tag.step, c.tag.layer, -1, rank, host,
        0 if rank is None else rank, *texts, detail, elements=found.elements if found else (),
        n_wrong=found.n_wrong if found else None,
    )  # fmt: skip
    return Verdict(
        False, Established(0), where, check=c.name, expected=expected, actual=actual
    )
