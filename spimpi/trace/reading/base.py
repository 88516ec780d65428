"""What every opened trace offers, whatever it was read from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spimpi.errors import IncompleteError, UsageError
from spimpi.printable import one_line
from spimpi.trace.reading.sketches import combined
from spimpi.trace.schema import EVENT, RankInfo, TensorInfo, joined_events


class DamageError(IncompleteError):
    """Rows or tables of a trace are there, but not as they were written."""


@dataclass(frozen=True)
class Block:
    """Some rows of a trace, side by side: ``columns`` by name, ``rank`` (int32) of each row."""

    rank: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.rank)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rank if name == "rank" else self.columns[name]

    def where(self, chosen: np.ndarray) -> "Block":
        """The rows that a mask or positions choose."""
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return Block(self.rank[chosen], columns)


LATEST = 1e10  # seconds from a run's start


def check_times(rows, where: str = "") -> None:
    """DamageError where times of ``rows`` (columns by name) are none that a run can have."""
    for name in ("t_start", "t_end"):
        times = rows[name]
        # Written so that a NaN, which compares with nothing, is found as well. One pass tells most.
        with np.errstate(all="ignore"):
            if np.dot(times, times) < LATEST**2:
                continue
        if not (-LATEST < times.min() and times.max() < LATEST):
            msg = f"{where}: its events have times ({name}) that no run can have"
            raise DamageError(msg)


def joined(blocks: Sequence[Block]) -> Block:
    """All rows of some blocks of all columns, in one."""
    if not blocks:
        return Block(np.zeros(0, np.int32), {name: np.zeros(0, EVENT[name]) for name in EVENT.names})
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in EVENT.names}
    return Block(np.concatenate([block.rank for block in blocks]), columns)


class Trace:
    """A trace that was opened.

    ``attributes`` what the run says of itself; ``ranks`` and ``tensors`` the tables; ``missing``
    what is not there of the run, ``damage`` what is there but was altered, one line each;
    ``driver`` "mpio", "parts", "gather" or "journals". A context manager.
    """

    path: Path
    driver: str
    attributes: dict
    ranks: list[RankInfo]
    tensors: list[TensorInfo]

    def __init__(self, path: Path):
        self.path = path
        self.missing: list[str] = []
        self.damage: list[str] = []

    def __repr__(self):
        run = one_line(self.attributes.get("run_id", "without a name"), 80)
        state = self.attributes.get("end_state", "not ended")
        state = "damaged" if self.damage else "incomplete" if self.missing else state
        held = f"{len(self.ranks):,} ranks, {len(self):,} events"
        return f"<spimpi trace {one_line(self.path.name, 80)}: run {run}, {state}, {held}>"

    @property
    def problems(self) -> list[str]:
        """What is missing, then what was altered."""
        return self.missing + self.damage

    @property
    def complete(self) -> bool:
        """Whether the run ended and all ranks' rows are there, as far as was looked at."""
        return not self.missing and not self.damage

    def __len__(self) -> int:
        """Number of events, of the ranks whose rows are there."""
        return sum(rank.count for rank in self.ranks)

    def column(self, name: str):
        """One column of all events, as it is stored: slice it (``trace.column("step")[:100]``).

        Read lazily from a sealed file, without the check of the rows' fingerprints.
        """
        _check_name(name)
        return self._column(name)

    def events(self, rank: int | None = None) -> np.ndarray:
        """The rows of a rank (or of all ranks, in rank order), dtype EVENT, shape (n,).

        Checked against the rank's fingerprint; IncompleteError where they are not intact.
        """
        if rank is not None:
            return self._rows(self._rank(rank))
        return joined_events([self._rows(info) for info in self.ranks])

    def intact_events(self, ranks: Sequence[RankInfo] | None = None):
        """Yield (RankInfo, its rows) for each rank whose rows are intact, one rank at a time.

        The others are named in ``problems`` and make the trace incomplete.
        """
        for info in self.ranks if ranks is None else ranks:
            try:
                rows = self._rows(info)
            except IncompleteError as error:
                self._note(error)
            else:
                yield info, rows

    def blocks(
        self, columns: Sequence[str] = EVENT.names, ranks: Sequence[int] | None = None
    ) -> Iterator[Block]:
        """Yield all rows in their order, some at a time, with only the columns that are wanted.

        ``ranks``: only theirs. Columns have the types of EVENT. Rows are checked (which takes all
        columns); ranks whose rows are not intact are left out and named in ``problems``.
        """
        for name in columns:
            _check_name(name)
        chosen = self.ranks if ranks is None else [self._rank(rank) for rank in ranks]
        return self._blocks(columns, chosen)

    def _blocks(self, columns: Sequence[str], ranks: Sequence[RankInfo]) -> Iterator[Block]:
        for info, rows in self.intact_events(ranks):
            rank = np.full(len(rows), info.rank, np.int32)
            yield Block(rank, {name: np.ascontiguousarray(rows[name]) for name in columns})

    def sketches(self) -> np.ndarray:
        """The sketch of each tensor of each step, dtype SKETCH, in program order; local.

        Shares of all ranks are added up. Empty where the run took none (``verify --sketch``). A
        sketch that lacks a share is left out, and told in ``missing``. IncompleteError
        (DamageError) where the file's rows are not as they were written.
        """
        sketches, lacking = combined(self.sketch_shares())
        if lacking:
            self._note(IncompleteError(f"{lacking} sketches lack some rank's share, left out"))
        return sketches

    def check_sketches(self) -> None:
        """Read all sketches; what is wrong with them is noted in ``problems``."""
        try:
            self.sketches()
        except IncompleteError as error:
            self._note(error)

    def to_pandas(
        self,
        columns: Sequence[str] | None = None,
        where: str | None = None,
        ranks: Sequence[int] | None = None,
    ):
        """A pandas DataFrame, a row a check, of the rows that ``where`` chooses, of ``ranks``.

        ``columns``: "rank", "host" and those of the schema, in this order unless chosen;
        ``host``, ``stage``, ``op``, ``verdict`` and ``tensor`` are categoricals of names.
        ``where``: a condition as ``DataFrame.query`` takes it, such as
        ``"verdict == 'FAILED' and layer >= 3"``. Rows are checked and read as ``blocks`` does
        it; of those that are not chosen none is kept. UsageError for a column or a name that the
        trace does not have, MissingDependency without pandas.
        """
        from spimpi.trace.reading.frames import to_pandas

        return to_pandas(self, columns, where, ranks)

    def to_xarray(self):
        """An xarray Dataset of all columns along "event", with the coordinate "rank".

        Lazy: a column is read where it is used, from the trace, which must still be open, and
        without the check of the rows' fingerprints (``spimpi trace check`` makes it). Types
        are the schema's; the names of numbers stand in the attributes ``flag_values`` (or
        ``flag_masks``) and ``flag_meanings``, as in the CF conventions. IncompleteError where a
        part is missing, MissingDependency without xarray.
        """
        from spimpi.trace.reading.arrays import to_xarray

        return to_xarray(self)

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

    def _column(self, name: str):
        raise NotImplementedError

    def _rows(self, info: RankInfo) -> np.ndarray:
        raise NotImplementedError

    def sketch_shares(self) -> np.ndarray:
        """All ranks' rows, dtype SKETCH_SHARE."""
        raise NotImplementedError

    def _note(self, error: IncompleteError) -> None:
        kept = self.damage if isinstance(error, DamageError) else self.missing
        if str(error) not in kept:
            kept.append(str(error))


def _check_name(name: str) -> None:
    if name not in EVENT.names:
        msg = f"a trace has no column {name!r}; there are {', '.join(EVENT.names)}"
        raise UsageError(msg)
