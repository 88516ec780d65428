"""Reading a trace: a sealed file of either driver, or the journals of a run that never sealed.

Needs no MPI and no numba. What is missing or altered is named in ``problems``; rows that cannot
be vouched for are refused (IncompleteError), never replaced by fill values.
"""

from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace import layout
from spimpi.trace.checksum import rows_fingerprint
from spimpi.trace.growing import merged, renumbered
from spimpi.trace.journal import OWN_HEADER, journal_folder, read_journal
from spimpi.trace.schema import EVENT, SCHEMA_VERSION, RankInfo, TensorInfo


def open(path) -> "Trace":
    """Open the trace ``path``; where it was never sealed, the journals beside it.

    UsageError where there is no trace, or one of a newer schema; IncompleteError where a trace
    is so damaged that nothing of it can be read.
    """
    path = Path(path)
    if path.name.endswith(".journal") and path.is_dir():
        path = path.with_name(path.name.removesuffix(".journal"))
    if path.is_file():
        return SealedTrace(path)
    folder = journal_folder(path)
    if folder.is_dir():
        return JournalTrace(path, folder)
    msg = f"there is no trace {path}" + (", it is a directory" if path.is_dir() else "")
    raise UsageError(msg)


class Trace:
    """A trace that was opened.

    ``attributes`` what the run says of itself; ``ranks`` and ``tensors`` the tables; ``complete``
    whether the run ended and all ranks' rows are there; ``problems`` what is missing or altered,
    one line each; ``driver`` "mpio", "parts" or "journals". A context manager.
    """

    path: Path
    driver: str
    attributes: dict
    ranks: list[RankInfo]
    tensors: list[TensorInfo]
    problems: list[str]
    complete: bool

    def __len__(self) -> int:
        """Number of events, of the ranks whose rows are there."""
        return sum(rank.count for rank in self.ranks)

    def column(self, name: str):
        """One column of all events, as it is stored: slice it (``trace.column("step")[:100]``).

        Read lazily from a sealed file, without the check of the rows' fingerprints.
        """
        raise NotImplementedError

    def events(self, rank: int | None = None) -> np.ndarray:
        """The rows of a rank (or of all ranks, in rank order), dtype EVENT, shape (n,).

        Checked against the rank's fingerprint; IncompleteError where they are not intact.
        """
        if rank is not None:
            return self._rows(self._rank(rank))
        rows = [self._rows(info) for info in self.ranks]
        return np.concatenate(rows) if rows else np.zeros(0, EVENT)

    def intact_events(self):
        """Yield (RankInfo, its rows) for each rank whose rows are intact, one rank at a time.

        The others are named in ``problems`` and make the trace incomplete.
        """
        for info in self.ranks:
            try:
                rows = self._rows(info)
            except IncompleteError as error:
                self._problem(str(error))
            else:
                yield info, rows

    def close(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _rank(self, rank: int) -> RankInfo:
        for info in self.ranks:
            if info.rank == rank:
                return info
        there = f"0..{len(self.ranks) - 1}" if self.complete else [r.rank for r in self.ranks]
        msg = f"{self.path} has no rank {rank}; there are {there}"
        raise UsageError(msg)

    def _rows(self, info: RankInfo) -> np.ndarray:
        raise NotImplementedError

    def _problem(self, text: str) -> None:
        self.complete = False
        if text not in self.problems:
            self.problems.append(text)


class SealedTrace(Trace):
    def __init__(self, path: Path):
        import h5py

        self.path, self.problems, self.complete = path, [], True
        try:
            self._file = h5py.File(path, "r", locking=False)
        except OSError:
            msg = f"{path} is not a trace: not an HDF5 file, or cut short"
            raise UsageError(msg) from None
        try:
            self._read_tables()
        except BaseException:
            self._file.close()
            raise

    def _read_tables(self) -> None:
        schema = self._attribute("schema_version")
        if schema is None:
            msg = f"{self.path} is not a trace: an HDF5 file without a schema_version"
            raise UsageError(msg)
        try:
            newer = int(schema) > SCHEMA_VERSION
            tables = None if newer else layout.read_tables(self._file)
        except Exception as error:  # noqa: BLE001  damaged metadata make h5py raise anything
            msg = f"{self.path}: its tables are damaged: {error}"
            raise IncompleteError(msg) from None
        if newer:
            msg = (
                f"{self.path} has schema {schema}, this spimpi reads up to schema "
                f"{SCHEMA_VERSION}: read it with a newer spimpi"
            )
            raise UsageError(msg)
        self.driver = self._attribute("driver")
        self.attributes, self.ranks, self.tensors, self._parts, sound = tables
        if not sound:
            self._problem("the attributes or the tables of ranks and tensors are damaged")
        for info in self.ranks if self.driver == "parts" else ():
            try:
                self._check_part(info)
            except IncompleteError as error:
                self._problem(str(error))

    def _attribute(self, name: str):
        try:
            return self._file.attrs.get(name)
        except (OSError, RuntimeError, KeyError, ValueError):
            return None

    def _part(self, info: RankInfo) -> Path:
        return self.path.parent / self._parts[info.rank]

    def _check_part(self, info: RankInfo) -> None:
        """Cheap: the part is there, of this run, and as long as the table says."""
        import h5py

        name = self._parts[info.rank]
        if not self._part(info).is_file():
            msg = f"rank {info.rank} on {info.host}: the part {name} is missing"
            raise IncompleteError(msg)
        try:
            with h5py.File(self._part(info), "r", locking=False) as part:
                found = (part.attrs["run_id"], int(part.attrs["rank"]), len(part["events/step"]))
        except Exception as error:  # noqa: BLE001
            msg = f"rank {info.rank} on {info.host}: the part {name} cannot be read: {error}"
            raise IncompleteError(msg) from None
        expected = (self.attributes.get("run_id", ""), info.rank, info.count)
        if found != expected:
            msg = (
                f"rank {info.rank} on {info.host}: the part {name} is not the one that was "
                f"written: expected run, rank, events {expected}, found {found}"
            )
            raise IncompleteError(msg)

    def column(self, name: str):
        if name not in EVENT.names:
            msg = f"a trace has no column {name!r}; there are {', '.join(EVENT.names)}"
            raise UsageError(msg)
        for info in self.ranks if self.driver == "parts" else ():
            self._check_part(info)  # a missing part would read as fill values
        return self._file[f"events/{name}"]

    def _rows(self, info: RankInfo) -> np.ndarray:
        import h5py

        try:
            if self.driver == "parts":
                self._check_part(info)
                with h5py.File(self._part(info), "r", locking=False) as part:
                    rows = layout.read_rows(part, 0, info.count)
            else:
                rows = layout.read_rows(self._file, info.offset, info.count)
        except IncompleteError:
            raise
        except Exception as error:  # noqa: BLE001
            msg = f"rank {info.rank} on {info.host}: its events cannot be read: {error}"
            raise IncompleteError(msg) from None
        found = rows_fingerprint(rows)
        if found != info.fingerprint:
            msg = (
                f"rank {info.rank} on {info.host}: its events were altered: expected fingerprint "
                f"{info.fingerprint:016x}, found {found:016x}"
            )
            raise IncompleteError(msg)
        return rows

    def close(self) -> None:
        self._file.close()


class JournalTrace(Trace):
    """The journals of a run that was killed, or that is still going on: never complete."""

    driver = "journals"

    def __init__(self, path: Path, folder: Path):
        self.path, self.complete = path, False
        self.problems = [
            f"{path.name} was never sealed: the run was killed, has not ended or could not seal; "
            "this is what its journals hold"
        ]
        journals = [read_journal(file) for file in sorted(folder.glob("rank-*.journal"))]
        self._use([journal for journal in journals if journal.header])
        for journal in journals:
            self.problems += journal.problems
            if not journal.complete and not journal.problems:
                self.problems.append(
                    f"{journal.path.name}: not closed, {len(journal.events)} events were flushed"
                )
        world = self.attributes.get("world")
        there = {info.rank for info in self.ranks}
        missing = [r for r in range(world if isinstance(world, int) else 0) if r not in there]
        if missing:
            some = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
            self.problems.append(f"no journal of {len(missing)} of {world} ranks: {some}")

    def _use(self, journals) -> None:
        self.attributes, self.tensors, self.ranks, self._events = {}, [], [], {}
        if not journals:
            return
        first = journals[0]
        self.attributes = {k: v for k, v in first.header.items() if k not in OWN_HEADER}
        self.tensors = first.tensors
        run_id = first.header.get("run_id")
        others = [j for j in journals if j.header.get("run_id") != run_id]
        self.problems += [f"{j.path.name}: of another run, left out" for j in others]
        journals = [j for j in journals if j.header.get("run_id") == run_id]
        if first.grows:
            self.tensors, numbers = merged([j.tensors for j in journals])
            for journal, own in zip(journals, numbers):
                journal.events = renumbered(journal.events, own)
        offset = 0
        for journal in journals:
            header = journal.header
            rank, count = header["rank"], len(journal.events)
            self.ranks.append(
                RankInfo(
                    rank, header["host"], header["pid"], header["device"],
                    float(header["started"]), offset, count, journal.fingerprint,
                )
            )  # fmt: skip
            self._events[rank] = journal.events
            offset += count

    def column(self, name: str):
        if name not in EVENT.names:
            msg = f"a trace has no column {name!r}; there are {', '.join(EVENT.names)}"
            raise UsageError(msg)
        return self.events()[name]

    def _rows(self, info: RankInfo) -> np.ndarray:
        return self._events[info.rank]
