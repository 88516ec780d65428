"""The journals of a run that was never sealed, read as a trace."""

from itertools import islice
from pathlib import Path

import numpy as np

from spimpi.errors import UsageError
from spimpi.trace.checksum import rows_fingerprint
from spimpi.trace.journals.growing import merged, renumbered
from spimpi.trace.journals.journal import OWN_HEADER, JournalContents, read_journal
from spimpi.trace.journals.journal_files import files_of, in_use, journals_in
from spimpi.trace.journals.node_file import Stream
from spimpi.trace.reading.base import Trace, check_times
from spimpi.trace.schema import MOST_RANKS, SKETCH_SHARE, RankInfo


class JournalTrace(Trace):
    """The journals of a run that was killed, or that is still going on: never complete.

    ``running``: whether a process still writes one of them, as far as the file system's locks
    tell (those of another node are seen where the file system shares locks between nodes).
    """

    driver = "journals"

    def __init__(self, path: Path, folder: Path):
        super().__init__(path)
        self.attributes, self.tensors, self.ranks = {}, [], []
        self.end_states: set[str | None] = set()
        self._files, self._numbers = {}, {}
        self.never_sealed = (
            f"{path.name} was never sealed: the run was killed, has not ended or could not seal; "
            "this is what its journals hold"
        )
        self.missing.append(self.never_sealed)
        try:
            self.journals, missing, damage = journals_in(folder)
            self.missing += missing
            self.damage += damage
            self.running = any(map(in_use, files_of(self.journals)))
            self._use([_without_events(file) for file in self.journals])
        except OSError as error:
            msg = f"the journals in {folder} cannot be read: {error.strerror} ({error.filename})"
            raise UsageError(msg) from error

    def _use(self, journals: list[JournalContents]) -> None:
        for journal in journals:
            self.missing += journal.missing
            self.damage += journal.damage
        journals = [journal for journal in journals if journal.header]
        if not journals:
            self.missing.append("no journal whose header can be read")
            return
        first = journals[0]
        run_id = first.header.get("run_id")
        others = [j for j in journals if j.header.get("run_id") != run_id]
        self.damage += [f"{j.path.name}: of another run, left out" for j in others]
        journals = self._one_a_rank([j for j in journals if j.header.get("run_id") == run_id])
        self.attributes = {k: v for k, v in first.header.items() if k not in OWN_HEADER}
        self.tensors = first.tensors
        self.end_states = {journal.end_state for journal in journals}
        if first.grows:
            self.tensors, numbers = merged([j.tensors for j in journals])
            self._numbers = {j.header["rank"]: own for j, own in zip(journals, numbers)}
        offset = 0
        for journal in journals:
            header, count = journal.header, journal.count
            rank = header["rank"]
            self._files[rank] = journal.path
            info = RankInfo(
                rank, header["host"], header["pid"], header["device"],
                float(header["started"]), offset, count, journal.fingerprint,
            )  # fmt: skip
            if rank in self._numbers:
                changed = rows_fingerprint(self._rows(info))
                info = RankInfo(**{**vars(info), "fingerprint": changed})
            self.ranks.append(info)
            offset += count
            if not journal.complete and not journal.problems:
                self.missing.append(f"{journal.path.name}: not closed, {count} events were flushed")
            if journal.sketches is not None:
                self.missing += journal.sketches.missing
                self.damage += journal.sketches.damage
        if "world" in self.attributes:
            self._name_absent(self.attributes["world"])

    def _name_absent(self, world: int) -> None:
        absent = (rank for rank in range(world) if rank not in self._files)
        if n_absent := world - len(self._files):
            first = list(islice(absent, 11))
            some = ", ".join(map(str, first[:10])) + (", …" if len(first) > 10 else "")
            self.missing.append(f"no journal of {n_absent} of {world} ranks: {some}")

    def _one_a_rank(self, journals: list[JournalContents]) -> list[JournalContents]:
        """The first of each rank: what was copied from several nodes may hold one twice."""
        of_rank: dict[int, JournalContents] = {}
        world = journals[0].header.get("world", MOST_RANKS)
        for journal in journals:
            rank = journal.header["rank"]
            if rank >= world:
                self.damage.append(f"{journal.path.name}: of rank {rank} of {world}; left out")
                continue
            first = of_rank.setdefault(rank, journal)
            if first is not journal:
                said = f"{journal.path.name}: of rank {rank}, as {first.path.name} is; left out"
                self.damage.append(said)
        return list(of_rank.values())

    def _column(self, name: str):
        return self.events()[name]

    def _rows(self, info: RankInfo) -> np.ndarray:
        journal = self._files[info.rank]
        rows = read_journal(journal).events[: info.count]
        check_times(rows, journal.name)
        numbers = self._numbers.get(info.rank)
        return rows if numbers is None else renumbered(rows, numbers)

    def sketch_shares(self) -> np.ndarray:
        found = [read_journal(file).sketches for file in self._files.values()]
        rows = [one.rows for one in found if one is not None]
        return np.concatenate(rows) if rows else np.zeros(0, SKETCH_SHARE)


def _without_events(path: Path | Stream) -> JournalContents:
    """A journal's facts; its rows are read again when they are wanted, one rank at a time."""
    contents = read_journal(path)
    contents.count, contents.events = len(contents.events), contents.events[:0]
    return contents
