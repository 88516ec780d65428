"""Sealing what is intact of a killed run's journals. One process, no MPI."""

import os.path
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace.checksum import rows_fingerprint
from spimpi.trace.journals.journal_files import files_of, lock, remove_file
from spimpi.trace.journals.synced import sync
from spimpi.trace.reading import sketches
from spimpi.trace.reading.check import check, refuse_running
from spimpi.trace.reading.reader import places
from spimpi.trace.reading.reader import open as open_trace
from spimpi.trace.reading.sealed import SealedTrace, sealed_run_id
from spimpi.trace.reading.unsealed import JournalTrace
from spimpi.trace.sealing import layout
from spimpi.trace.sealing.drivers import Plan, write_alone
from spimpi.trace.sealing.leftovers import Sealing, killed_sealings, new_token
from spimpi.trace.sealing.seal import check_place, clear, clear_folder
from spimpi.whole_file import publish

REPLACES = "--overwrite (overwrite=True) replaces it by what the journals hold"


@dataclass(frozen=True)
class Recovered:
    """What was sealed, what the journals lacked, and the journals that are kept.

    ``was_sealed``: the trace was sealed already, and only journals were left to remove.
    """

    file: str
    ranks: int
    events: int
    missing: list[str]
    kept: list[str]
    was_sealed: bool = False


def recover(path, overwrite: bool = False) -> Recovered:
    """Seal the journals of a run that was killed, or whose sealing was interrupted.

    The trace is marked incomplete (attribute ``missing``) unless every rank's journal is there
    and closed. Journals go after the sealed file was read back, but for those of which something
    was left out as damaged. UsageError where there is nothing to recover, a job still writes it,
    or another trace is in the way; IncompleteError where no journal can be read.
    """
    path, folder = places(path)
    if not os.path.isdir(folder):  # os.path, as in open
        there = f"there is no trace {path}"
        if os.path.isfile(path):
            with open_trace(path):  # raises what it is, where it is no trace
                there = f"{path} is sealed"
        msg = f"nothing to recover: {there}, and there are no journals {folder}"
        raise UsageError(msg)
    check_place(path)
    trace = JournalTrace(path, folder)
    refuse_running(trace)
    if not trace.journals and not trace.damage and path.is_file():
        return _already_sealed(trace, folder)
    if not trace.ranks:
        msg = f"{folder}: {'; '.join(trace.problems[1:])}"
        raise IncompleteError(msg)
    with ExitStack() as held:
        for file in files_of(trace.journals):
            held.enter_context(_locked(path, file))
        if path.is_file() and not overwrite:
            return _already_sealed(trace, folder)
        _undo_killed(path, folder)
        sealing = Sealing(path, folder, new_token())
        sealed = _seal(trace, sealing, overwrite)
        return _remove(trace, sealing, sealed, overwrite)


def _undo_killed(path: Path, folder: Path) -> None:
    for sealing in killed_sealings(path, folder):
        sealing.undo()


def _locked(path: Path, journal: Path):
    try:
        held = lock(journal)
    except OSError as error:
        msg = f"{journal} cannot be opened for writing: {error.strerror}"
        raise UsageError(msg) from error
    if held is None:
        msg = f"the journals of {path} are in use by another process"
        raise UsageError(msg)
    return held


def _already_sealed(trace: JournalTrace, folder: Path) -> Recovered:
    """A sealed trace is there: where it holds all that the journals do, these are removed.

    So it is after an interrupted removal, by the run itself or by a recovery.
    """
    path = trace.path
    if trace.ranks and sealed_run_id(path) != trace.attributes.get("run_id"):
        msg = f"{path} is there, of another run; {REPLACES}"
        raise UsageError(msg)
    found = check(path)
    with open_trace(path) as sealed:
        there = {info.rank: info.count for info, _ in sealed.intact_events()}
    lost = [i.rank for i in trace.ranks if there.get(i.rank, -1) < i.count]
    if found.damage or lost:
        msg = f"{path} is there, of the same run and {found.state}; {REPLACES}"
        raise UsageError(msg)
    for file in files_of(trace.journals):
        remove_file(file)
    _undo_killed(path, folder)
    clear_folder(path, folder)
    return Recovered(str(path), found.ranks, found.events, found.missing, [], was_sealed=True)


def _seal(trace: JournalTrace, sealing: Sealing, overwrite: bool) -> SealedTrace:
    """Write the file, read it back, give it its name."""
    ranks, ranges = [], []
    for info, rows in trace.intact_events():
        offset = ranks[-1].offset + ranks[-1].count if ranks else 0
        fingerprint = rows_fingerprint(rows)
        ranks.append(replace(info, offset=offset, count=len(rows), fingerprint=fingerprint))
        ranges.append(layout.column_range(rows))
    taken = None
    if trace.attributes.get(sketches.ATTRIBUTE):
        trace.check_sketches()
        taken = trace.sketch_shares()
    lows, highs = (np.array(bounds) for bounds in zip(*ranges))
    missing = [line for line in trace.problems if line != trace.never_sealed]
    ended = trace.end_states if len(trace.end_states) == 1 and not missing else {"incomplete"}
    attributes = {**trace.attributes, "end_state": ended.pop() or "incomplete", "recovered": True}
    if missing:
        attributes[layout.MISSING] = missing
    if taken is not None:
        attributes[sketches.ATTRIBUTE] = sketches.facts_of(taken)
    plan = Plan(
        path=trace.path,
        own=None,
        total=sum(info.count for info in ranks),
        types=layout.column_types(lows.min(axis=0), highs.max(axis=0)),
        run_id=trace.attributes.get("run_id", ""),
        ranks=ranks,
        attributes=attributes,
        tensors=trace.tensors,
        temporary=sealing.file,
        sketches=taken,
        sealing=sealing,
    )
    blocks = ((info.offset, trace.events(info.rank)[: info.count]) for info in ranks)
    with ExitStack() as undo:
        try:
            sealing.begin()
            undo.callback(sealing.note.unlink, missing_ok=True)
            write_alone(plan, blocks, undo)
        except OSError as error:
            msg = f"cannot write {plan.temporary}: {error.strerror or error}; the journals are kept"
            raise IncompleteError(msg) from error
        sync(plan.temporary)
        sealed = _read_back(plan)
        publish(plan.temporary, plan.path, overwrite)
        sync(plan.path.parent)
        undo.pop_all()
    return sealed


def _read_back(plan: Plan) -> SealedTrace:
    with SealedTrace(plan.temporary) as sealed:
        intact = [info for info, _ in sealed.intact_events()]
        sealed.check_columns(intact)
        sealed.check_sketches()
    if sealed.damage or intact != plan.ranks:
        msg = (
            f"read back, {plan.temporary.name} does not hold what was written: "
            f"{'; '.join(sealed.damage) or 'other ranks'}; the journals are kept"
        )
        raise IncompleteError(msg)
    return sealed


def _remove(trace: JournalTrace, sealing: Sealing, sealed: SealedTrace, overwrite) -> Recovered:
    damaged = [
        journal for journal in trace.journals
        if any(line.startswith(f"{journal.stem}.") for line in trace.damage)
    ]  # fmt: skip
    kept = files_of(damaged)
    for file in files_of(trace.journals):
        if file not in kept:
            remove_file(file)
    clear(sealing, overwrite)
    events = sum(info.count for info in sealed.ranks)
    return Recovered(str(trace.path), len(sealed.ranks), events, sealed.missing, list(map(str, kept)))
