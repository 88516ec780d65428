"""A sealed trace: one HDF5 file, or one that shows a file a rank."""

import os
import re
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError, UsageError
from spimpi.hdf5_guard import open_hdf5, own_attribute, own_numbers, shown_dataset, sources
from spimpi.printable import one_line
from spimpi.regular_file import open_regular
from spimpi.trace.checksum import checksums, compiled_checksums, rank_fingerprints, rows_fingerprint
from spimpi.trace.facts import is_rank, sound_facts
from spimpi.trace.reading import sketches
from spimpi.trace.reading.base import Block, DamageError, Trace, check_times
from spimpi.trace.reading.pieces import Span, groups, pieces
from spimpi.trace.schema import EVENT, ENUMERATIONS, SCHEMA_VERSION, SKETCH_SHARE, RankInfo
from spimpi.trace.sealing import layout

LARGE = 4_000_000  # rows, from which on it pays to load numba
MOST_ROWS = 1 << 48
SIGNATURE = b"\x89HDF\r\n\x1a\n"
PART = re.compile(r"[^/]+\.parts/rank-(\d{5,10})\.h5")


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
            if not ("schema_version" in self._file.attrs or self._file.id.links.exists(b"events")):
                msg = f"{self.path} is not a trace: an HDF5 file without a schema_version"
                raise UsageError(msg)
            schema = int(own_attribute(self._file, "schema_version"))
            tables = None
            if schema <= SCHEMA_VERSION:
                self.driver = own_attribute(self._file, "driver")
                tables = layout.read_tables(self._file)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001  damaged metadata make h5py raise anything
            msg = f"{self.path}: its attributes and tables are damaged: {one_line(error, 300)}"
            raise DamageError(msg) from None
        if tables is None:
            msg = (
                f"{self.path} has schema {schema}, this spimpi reads up to schema "
                f"{SCHEMA_VERSION}: read it with a newer spimpi"
            )
            raise UsageError(msg)
        attributes, self.ranks, self.tensors, self._parts, sound = tables
        if not sound or schema < 1:
            self.damage.append("the attributes or the tables of ranks and tensors were altered")
        self.attributes, others = sound_facts(attributes)
        self.damage += [f"the attribute {name} is not what spimpi writes" for name in others]
        self._leave_out_impossible_ranks()
        if sound:
            self.missing += self.attributes.get(layout.MISSING, [])
        if self.driver == "parts":
            for info in self.ranks:
                try:
                    self._check_part(info)
                except IncompleteError as error:
                    self._note(error)

    def _leave_out_impossible_ranks(self) -> None:
        """Ranks that cannot be: of other numbers than the run's, rows that are not there or another's."""
        total, world, numbers, end, possible = 0, self.attributes.get("world"), set(), 0, []
        try:
            total = min(len(self._step()), MOST_ROWS)
        except Exception as error:  # noqa: BLE001
            self.damage.append(f"the columns of events are damaged: {one_line(error, 300)}")
        for info in self.ranks:
            its_own = info.rank not in numbers and (world is None or info.rank < world)
            if is_rank(info) and its_own and end <= info.offset <= total - info.count:
                possible.append(info)
                numbers.add(info.rank)
                end = info.offset + info.count
        if n := len(self.ranks) - len(possible):
            self.damage.append(f"the table of ranks: {n} of {len(self.ranks)} ranks cannot be")
        self.ranks = possible

    def _step(self):
        """The column of steps, to know its length."""
        opened = shown_dataset if self.driver == "parts" else own_numbers
        return layout.event_column(self._file, "step", opened)

    def _part(self, info: RankInfo) -> str:
        """Name of a rank's part, relative to the trace's folder: never a file of somebody else."""
        where = f"rank {info.rank} on {info.host}"
        if info.rank >= len(self._parts):
            msg = f"{where}: the table of parts was altered"
            raise DamageError(msg)
        part, folder = self._parts[info.rank], os.path.join(self._folder, "")
        named = PART.fullmatch(part)
        inside = named and int(named[1]) == info.rank
        if not inside or not os.path.realpath(folder + part).startswith(folder):
            msg = f"{where}: the part {part} is no file beside the trace, and is not read"
            raise DamageError(msg)
        return part

    @cached_property
    def _folder(self) -> str:
        return os.path.realpath(self.path.parent)

    @contextmanager
    def _opened_part(self, info: RankInfo, name: str = "step"):
        """A rank's part, which is there, of this run, and whose column is as long as the table says."""
        where = f"rank {info.rank} on {info.host}: the part {self._part(info)}"
        expected = (self.attributes.get("run_id", ""), info.rank, info.count)
        with ExitStack() as held:
            try:
                part = held.enter_context(open_hdf5(self.path.parent / self._part(info)))
                run_id, rank = own_attribute(part, "run_id"), int(own_attribute(part, "rank"))
                found = (run_id, rank, len(layout.event_column(part, name)))
            except FileNotFoundError:
                msg = f"{where} is missing"
                raise IncompleteError(msg) from None
            except Exception as error:  # noqa: BLE001
                msg = f"{where} is damaged: {one_line(error, 300)}"
                raise DamageError(msg) from None
            if found != expected:
                msg = (
                    f"{where} is not the one that was written: expected run, rank, events "
                    f"{expected}, found {found}"
                )
                raise DamageError(msg)
            yield part

    def _check_part(self, info: RankInfo, name: str = "step") -> None:
        """The part is there, and holds a column itself: what shows it would follow it anywhere."""
        with self._opened_part(info, name):
            pass

    def _column(self, name: str):
        for info in self.ranks if self.driver == "parts" else ():
            self._check_part(info, name)  # a missing part would read as fill values
        self._require_open()
        try:
            return self._as_written(name)
        except DamageError:
            raise
        except Exception as error:  # noqa: BLE001
            msg = f"the column {name} is damaged: {one_line(error, 300)}"
            raise DamageError(msg) from None

    @cached_property
    def _own(self) -> dict:
        """The columns by name, where they lie in the file itself."""
        return layout.event_columns(self._file)

    def _as_written(self, name: str):
        """A column that holds its rows, or shows the ranks' parts, each at the rank's place."""
        if self.driver != "parts":
            return self._own[name]
        column = layout.event_column(self._file, name, shown_dataset)
        expected = [
            (self._part(info).replace("%", "%%"), f"events/{name}", info.offset, info.count)
            for info in self.ranks if info.count
        ]  # fmt: skip
        if not expected:
            return layout.event_column(self._file, name)
        if sources(column) != expected:
            msg = f"the column {name} was altered: it does not show the ranks' parts and nothing else"
            raise DamageError(msg)
        return column

    def _require_open(self) -> None:
        """A trace that its reader closed is no damaged one."""
        if not self._file:
            msg = f"the trace {self.path} was closed; open it again (spimpi.trace.open)"
            raise UsageError(msg)

    def _rows(self, info: RankInfo) -> np.ndarray:
        self._require_open()
        if self.driver != "parts":
            return _intact(lambda: self._own, info, info.offset)
        with self._opened_part(info) as part:
            return _intact(lambda: layout.event_columns(part), info, 0)

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
        found, rows, n_pieces = np.zeros(len(group), np.uint64), {}, 0
        try:
            for piece in pieces(group):
                rows = self._piece(piece, EVENT.names)
                counts = [span.count for span in piece]
                each = rank_fingerprints(rows, counts, piece[0].first, judge)
                found ^= np.array(each, np.uint64)
                n_pieces += 1
                check_times(rows)
        except Exception:  # noqa: BLE001  damaged data make h5py raise anything
            return None
        if found.tolist() != [info.fingerprint for info in group]:
            return None
        return rows if n_pieces == 1 else {}

    def _piece(self, piece: list[Span], names) -> dict[str, np.ndarray]:
        """Columns of some spans that lie one after the other, as they are stored."""
        if self.driver != "parts":
            first = piece[0].info.offset + piece[0].first
            end = first + sum(span.count for span in piece)
            return {name: _slice(self._own[name], first, end) for name in names}
        read = {name: [] for name in names}
        for span in piece:
            end = span.first + span.count
            with self._opened_part(span.info) as part:
                for name, column in layout.event_columns(part, names).items():
                    read[name].append(_slice(column, span.first, end))
        return {name: np.concatenate(columns) for name, columns in read.items()}

    def check_columns(self, ranks: list[RankInfo]) -> None:
        """Check what other readers of HDF5 rely on; what is altered is noted in ``damage``.

        The columns hold the rows of these ranks at the places that /ranks says, nothing more,
        and name their numbers as this spimpi does.
        """
        try:
            total, columns = len(self), {}
            for name in EVENT.names:
                column = columns[name] = self._as_written(name)
                if column.shape != (total,):
                    msg = f"the column {name} has shape {column.shape}, expected ({total},)"
                    raise DamageError(msg)
                if name in ENUMERATIONS:
                    _check_names(name, column)
            for info in ranks if self.driver == "parts" else ():
                _intact(lambda: columns, info, info.offset)
        except DamageError as error:
            self._note(error)
        except Exception as error:  # noqa: BLE001
            self.damage.append(f"the columns of events are damaged: {one_line(error, 300)}")

    def sketch_shares(self) -> np.ndarray:
        expected = self.attributes.get(sketches.ATTRIBUTE)
        if not expected:
            return np.zeros(0, SKETCH_SHARE)
        try:
            rows = sketches.read_group(self._file)
            found = sketches.facts_of(rows)
        except Exception as error:  # noqa: BLE001
            msg = f"the sketches cannot be read: {one_line(error, 300)}"
            raise DamageError(msg) from None
        if found != expected:
            msg = f"the sketches were altered: expected {expected}, found {found}"
            raise DamageError(msg)
        return rows

    def close(self) -> None:
        self._file.close()


def sealed_run_id(path: Path) -> str | None:
    """The run that a sealed file is of; None where that can't be read."""
    with suppress(Exception), open_hdf5(path) as file:
        return own_attribute(file, "run_id")


def _opened(path: Path):
    try:
        with open_regular(path) as file:
            start = file.read(len(SIGNATURE))
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise UsageError(msg) from None
    try:
        return open_hdf5(path)
    except Exception as error:  # noqa: BLE001
        if "don't match" in str(error) or "doesn't match" in str(error):
            msg = f"{path} is open in this process in another way: close it first ({one_line(error)})"
            raise UsageError(msg) from None
        # One flipped byte is no other format.
        if sum(a == b for a, b in zip(start, SIGNATURE)) < len(SIGNATURE) - 1:
            msg = f"{path} is not a trace: not an HDF5 file"
            raise UsageError(msg) from None
        msg = f"{path} is damaged or cut short: {one_line(error, 300)}"
        raise DamageError(msg) from None


def _slice(column, start: int, end: int) -> np.ndarray:
    rows = column[start:end]
    if rows.shape != (end - start,):
        msg = f"the column {column.name} is too short"
        raise DamageError(msg)
    return rows


def _intact(columns, info: RankInfo, start: int) -> np.ndarray:
    """A rank's rows, from ``start`` of what ``columns()`` gives by name, or DamageError."""
    where = f"rank {info.rank} on {info.host}"
    try:
        rows = layout.read_rows(columns(), start, info.count)
    except Exception as error:  # noqa: BLE001
        msg = f"{where}: its events cannot be read: {one_line(error, 300)}"
        raise DamageError(msg) from None
    found = rows_fingerprint(rows)
    if found != info.fingerprint:
        msg = (
            f"{where}: its events were altered: expected fingerprint {info.fingerprint:016x}, "
            f"found {found:016x}"
        )
        raise DamageError(msg)
    check_times(rows, where)
    return rows


def _check_names(name: str, column) -> None:
    """The names of the numbers are ours, as far as this spimpi knows them."""
    attributes, flags = column.attrs, layout.flags_of(name, column.dtype)
    found = dict(zip((int(v) for v in attributes["values"]), attributes["names"]))
    for member in ENUMERATIONS[name]:
        if found.get(int(member), member.name) != member.name:
            msg = f"the column {name} calls {int(member)} {found[int(member)]}, not {member.name}"
            raise DamageError(msg)
    for flag, ours in flags.items() if "flag_meanings" in attributes else ():
        theirs = attributes[flag]
        if isinstance(ours, str):
            ours, theirs = ours.split(), theirs.split()
        if list(theirs[: len(ours)]) != list(ours):
            msg = f"the column {name} has other {flag} than spimpi writes"
            raise DamageError(msg)
