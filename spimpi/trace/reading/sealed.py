"""A sealed trace: one HDF5 file, or one that shows a file a rank."""

from contextlib import suppress
from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError, UsageError
from spimpi.trace.checksum import checksums, compiled_checksums, rank_fingerprints, rows_fingerprint
from spimpi.trace.reading import sketches
from spimpi.trace.reading.base import Block, DamageError, Trace
from spimpi.trace.reading.pieces import Span, groups, pieces
from spimpi.trace.schema import ENUMERATIONS, EVENT, SCHEMA_VERSION, SKETCH_SHARE, RankInfo
from spimpi.trace.sealing import layout

LARGE = 4_000_000  # rows, from which on it pays to load numba
MOST_RANKS = np.iinfo(np.int32).max  # MPI's ranks are int
SIGNATURE = b"\x89HDF\r\n\x1a\n"


class SealedTrace(Trace):
    def __init__(self, path: Path):
        super().__init__(path)
        self._file = _opened(path)
        try:
            self._read_tables()
        except BaseException:
            self._file.close()
            raise

    def _read_tables(self) -> None:
        try:
            if "schema_version" not in self._file.attrs and "events" not in self._file:
                msg = f"{self.path} is not a trace: an HDF5 file without a schema_version"
                raise UsageError(msg)
            schema = int(self._file.attrs["schema_version"])
            tables = None
            if schema <= SCHEMA_VERSION:
                self.driver = self._file.attrs["driver"]
                tables = layout.read_tables(self._file)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001  damaged metadata make h5py raise anything
            msg = f"{self.path}: its attributes and tables are damaged: {_first_line(error)}"
            raise DamageError(msg) from None
        if tables is None:
            msg = (
                f"{self.path} has schema {schema}, this spimpi reads up to schema "
                f"{SCHEMA_VERSION}: read it with a newer spimpi"
            )
            raise UsageError(msg)
        self.attributes, self.ranks, self.tensors, self._parts, sound = tables
        if not sound or schema < 1:
            self.damage.append("the attributes or the tables of ranks and tensors were altered")
            self._leave_out_impossible_ranks()
        lacks = self.attributes.get(layout.MISSING)
        if sound and lacks:
            self.missing += lacks
        if self.driver == "parts":
            for info in self.ranks:
                try:
                    self._check_part(info)
                except IncompleteError as error:
                    self._note(error)

    def _leave_out_impossible_ranks(self) -> None:
        """Ranks that an altered table puts where no rank or no row can be."""
        try:
            total = len(self._file["events/step"])
        except Exception:  # noqa: BLE001
            total = 0
        possible = [
            info
            for info in self.ranks
            if 0 <= info.rank <= MOST_RANKS
            and min(info.offset, info.count) >= 0
            and info.offset + info.count <= total
        ]
        if n := len(self.ranks) - len(possible):
            self.damage.append(f"the table of ranks: {n} of {len(self.ranks)} ranks cannot be")
        self.ranks = possible

    def _part(self, info: RankInfo) -> str:
        """Name of a rank's part, relative to the trace's folder."""
        if not 0 <= info.rank < len(self._parts):
            msg = f"rank {info.rank} on {info.host}: the table of parts was altered"
            raise DamageError(msg)
        return self._parts[info.rank]

    def _opened_part(self, info: RankInfo):
        import h5py

        path = self.path.parent / self._part(info)
        if not path.is_file():
            msg = f"rank {info.rank} on {info.host}: the part {self._part(info)} is missing"
            raise IncompleteError(msg)
        return h5py.File(path, "r", locking=False)

    def _check_part(self, info: RankInfo) -> None:
        """Cheap: the part is there, of this run, and as long as the table says."""
        try:
            with self._opened_part(info) as part:
                found = (part.attrs["run_id"], int(part.attrs["rank"]), len(part["events/step"]))
        except IncompleteError:
            raise
        except Exception as error:  # noqa: BLE001
            msg = (
                f"rank {info.rank} on {info.host}: the part {self._part(info)} is damaged: "
                f"{_first_line(error)}"
            )
            raise DamageError(msg) from None
        expected = (self.attributes.get("run_id", ""), info.rank, info.count)
        if found != expected:
            msg = (
                f"rank {info.rank} on {info.host}: the part {self._part(info)} is not the one that "
                f"was written: expected run, rank, events {expected}, found {found}"
            )
            raise DamageError(msg)

    def _column(self, name: str):
        for info in self.ranks if self.driver == "parts" else ():
            self._check_part(info)  # a missing part would read as fill values
        self._require_open()
        return self._file[f"events/{name}"]

    def _require_open(self) -> None:
        """A trace that its reader closed is no damaged one."""
        if not self._file:
            msg = f"the trace {self.path} was closed; open it again (spimpi.trace.open)"
            raise UsageError(msg)

    def _rows(self, info: RankInfo) -> np.ndarray:
        self._require_open()
        if self.driver != "parts":
            return _intact(self._file, info, info.offset)
        self._check_part(info)
        with self._opened_part(info) as part:
            return _intact(part, info, 0)

    def _blocks(self, columns, ranks):
        large = sum(info.count for info in ranks) >= LARGE
        judge = (compiled_checksums() if large else None) or checksums
        for group in groups(ranks):
            held = self._intact_group(group, judge)
            if held is None:  # one rank at a time, to name those that are not intact
                yield from super()._blocks(columns, group)
                continue
            for piece in pieces(group):
                rows = held or self._piece(piece, columns)
                rank = np.repeat(
                    np.array([span.info.rank for span in piece], np.int32),
                    [span.count for span in piece],
                )
                wanted = {name: rows[name].astype(EVENT[name], copy=False) for name in columns}
                yield Block(rank, wanted)

    def _intact_group(self, group: list[RankInfo], judge) -> dict[str, np.ndarray] | None:
        """Check the rows of some ranks: all columns where they are one piece, else nothing kept.

        None where something is not as it was written, or cannot be read.
        """
        found, rows = np.zeros(len(group), np.uint64), {}
        cut = pieces(group)
        try:
            for piece in cut:
                rows = self._piece(piece, EVENT.names)
                counts = [span.count for span in piece]
                each = rank_fingerprints(rows, counts, piece[0].first, judge)
                found ^= np.array(each, np.uint64)
        except Exception:  # noqa: BLE001  damaged data make h5py raise anything
            return None
        if found.tolist() != [info.fingerprint for info in group]:
            return None
        return rows if len(cut) == 1 else {}

    def _piece(self, piece: list[Span], names) -> dict[str, np.ndarray]:
        """Columns of some spans that lie one after the other, as they are stored."""
        if self.driver != "parts":
            first = piece[0].info.offset + piece[0].first
            end = first + sum(span.count for span in piece)
            return {name: _slice(self._file, name, first, end) for name in names}
        read = {name: [] for name in names}
        for span in piece:
            self._check_part(span.info)
            with self._opened_part(span.info) as part:
                for name, columns in read.items():
                    columns.append(_slice(part, name, span.first, span.first + span.count))
        return {name: np.concatenate(columns) for name, columns in read.items()}

    def check_columns(self, ranks: list[RankInfo]) -> None:
        """Check what other readers of HDF5 rely on; what is altered is noted in ``damage``.

        The columns hold the rows of these ranks at the places that /ranks says, nothing more,
        and name their numbers as this spimpi does.
        """
        try:
            total = len(self)
            for name in EVENT.names:
                column = self._file[f"events/{name}"]
                if column.shape != (total,):
                    msg = f"the column {name} has shape {column.shape}, expected ({total},)"
                    raise DamageError(msg)
                if name in ENUMERATIONS:
                    _check_names(name, column.attrs)
            for info in ranks if self.driver == "parts" else ():
                _intact(self._file, info, info.offset)
        except DamageError as error:
            self._note(error)
        except Exception as error:  # noqa: BLE001
            self.damage.append(f"the columns of events are damaged: {_first_line(error)}")

    def sketch_shares(self) -> np.ndarray:
        expected = self.attributes.get(sketches.ATTRIBUTE)
        if not expected:
            return np.zeros(0, SKETCH_SHARE)
        try:
            rows = sketches.read_group(self._file)
            found = sketches.facts_of(rows)
        except Exception as error:  # noqa: BLE001
            msg = f"the sketches cannot be read: {_first_line(error)}"
            raise DamageError(msg) from None
        if found != expected:
            msg = f"the sketches were altered: expected {expected}, found {found}"
            raise DamageError(msg)
        return rows

    def close(self) -> None:
        self._file.close()


def sealed_run_id(path: Path) -> str | None:
    """The run that a sealed file is of; None where that can't be read."""
    import h5py

    with suppress(Exception), h5py.File(path, "r", locking=False) as file:
        return file.attrs["run_id"]


def _opened(path: Path):
    import h5py

    try:
        with path.open("rb") as file:
            start = file.read(len(SIGNATURE))
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise UsageError(msg) from None
    try:
        return h5py.File(path, "r", locking=False)
    except Exception as error:  # noqa: BLE001
        # One flipped byte is no other format.
        if sum(a == b for a, b in zip(start, SIGNATURE)) < len(SIGNATURE) - 1:
            msg = f"{path} is not a trace: not an HDF5 file"
            raise UsageError(msg) from None
        msg = f"{path} is damaged or cut short: {_first_line(error)}"
        raise DamageError(msg) from None


def _slice(group, name: str, start: int, end: int) -> np.ndarray:
    column = group[f"events/{name}"][start:end]
    if column.shape != (end - start,):
        msg = f"the column {name} is too short"
        raise DamageError(msg)
    return column


def _intact(group, info: RankInfo, start: int) -> np.ndarray:
    """A rank's rows of an open file, from ``start``, or DamageError."""
    where = f"rank {info.rank} on {info.host}"
    try:
        rows = layout.read_rows(group, start, info.count)
    except Exception as error:  # noqa: BLE001
        msg = f"{where}: its events cannot be read: {_first_line(error)}"
        raise DamageError(msg) from None
    found = rows_fingerprint(rows)
    if found != info.fingerprint:
        msg = (
            f"{where}: its events were altered: expected fingerprint {info.fingerprint:016x}, "
            f"found {found:016x}"
        )
        raise DamageError(msg)
    return rows


def _check_names(name: str, attributes) -> None:
    found = dict(zip((int(v) for v in attributes["values"]), attributes["names"]))
    for member in ENUMERATIONS[name]:
        if found.get(int(member), member.name) != member.name:
            msg = f"the column {name} calls {int(member)} {found[int(member)]}, not {member.name}"
            raise DamageError(msg)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
