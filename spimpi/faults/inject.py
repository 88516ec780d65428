"""Applies faults to the payloads of a run: in memory, in the real data path.

A recorded fingerprint is never touched: the checks must find the fault from the data. Only a
run with --inject has an Injector; it belongs to one rank and acts on that rank's faults.
"""

import numpy as np

from spimpi.faults.places import PLACES, part_of
from spimpi.inference.attention import NO_FAULT



class Injector:
    """One rank's faults. ``changed[i]`` tells whether fault i has changed any bit here."""

    def __init__(self, faults, ctx, config, lengths):
        self.faults, self.rank = tuple(faults), ctx.rank
        self.changed = [False] * len(self.faults)
        self.head_dim = config.head_dim
        self._pending: set[int] = set()
        self._held_before: dict[tuple[str, int], bytes] = {}
        self._own = [i for i, f in enumerate(self.faults) if f.rank == self.rank]
        self._parts = {
            i: part_of(f.tensor, f.rank, ctx.grid, config, lengths, f.step)
            for i, f in enumerate(self.faults)
        }
        self._stale = {
            (self.faults[i].tensor, self.faults[i].layer)
            for i in self._own
            if self.faults[i].kind == "stale"
        }

    def begin(self, step: int) -> None:
        """A step begins: the faults of this step are due, each once."""
        self._pending = {
            i
            for i in self._own
            if self.faults[i].step == step and not PLACES[self.faults[i].tensor].is_weight
        }

    def _due(self, kinds, tensor, layer) -> list[int]:
        def meets(fault):
            return fault.kind in kinds and (fault.tensor, fault.layer) == (tensor, layer)

        return [i for i in sorted(self._pending) if meets(self.faults[i])]

    def payload(self, tensor, layer, array, first_row) -> None:
        """bitflip, swap, stale and misplace on a payload, after it was fingerprinted.

        ``first_row``: the global row of the array's first one.
        """
        for i in self._due(("bitflip", "swap", "misplace", "stale"), tensor, layer):
            before = array.tobytes()
            if self._corrupt(i, array, first_row):
                self._done(i, array.tobytes() != before)
        if (tensor, layer) in self._stale:
            self._held_before[tensor, layer] = array.tobytes()

    def _corrupt(self, i, array, first_row) -> bool:
        """Change the array in place; False where the element is of another microbatch."""
        fault = self.faults[i]
        flat = array.reshape(-1)
        if fault.kind == "stale":
            self._make_stale(fault, array)
        elif fault.kind == "misplace":
            flat[:] = np.roll(flat, 1)
        else:
            place = self._locate(i, fault.element, array, first_row)
            if place is None:
                return False
            if fault.kind == "bitflip":
                _flip(flat, place, fault.bit)
            else:
                other = self._locate(i, fault.other, array, first_row)
                _swap(flat, place, other if fault.other is not None else None)
        return True

    def _make_stale(self, fault, array) -> None:
        """What the buffer held a step before; zeros where it has held nothing yet."""
        old = self._held_before.get((fault.tensor, fault.layer), b"")
        size = min(len(old), array.nbytes)
        raw = array.reshape(-1).view(np.uint8)
        if not size:
            raw[:] = 0
        raw[:size] = np.frombuffer(old[:size], np.uint8)

    def replica(self, tensor, layer, array, first_row) -> None:
        """replica: this rank's copy comes out different, before anything was fingerprinted."""
        for i in self._due(("replica",), tensor, layer):
            place = self._locate(i, self.faults[i].element, array, first_row)
            if place is not None:
                flat = array.reshape(-1)
                flat[place] += max(abs(flat[place]), 1)
                self._done(i, True)

    def drop(self, tensor, layer, contributes=True) -> bool:
        """drop: whether this rank's contribution to a sum is to be left out."""
        due = self._due(("drop",), tensor, layer) if contributes else []
        for i in due:
            self._done(i, True)
        return bool(due)

    def miscompute(self, tensor, layer, y, first_row) -> None:
        """miscompute: one integer of a matmul's result is off by one."""
        for i in self._due(("miscompute",), tensor, layer):
            place = self._locate(i, self.faults[i].element, y, first_row)
            if place is not None:
                y.reshape(-1)[place] += 1
                self._done(i, True)

    def in_attention(self, layer, first_row, n_rows) -> np.ndarray:
        """miscompute on scores or attn: (row, product, index) as attention.attend takes it."""
        for product, tensor in enumerate(("scores", "attn")):
            for i in self._due(("miscompute",), tensor, layer):
                part, element = self._parts[i], self.faults[i].element
                row, column = part.local(part.first if element is None else element)
                row += part.rows.start - first_row
                if 0 <= row < n_rows:
                    self._done(i, True)
                    return np.array([row, product, column], np.int64)
        return NO_FAULT

    # Weights: applied once, while they are loaded.

    def _of_weights(self, kinds, short, layer) -> list[int]:
        return [
            i
            for i in self._own
            if self.faults[i].kind in kinds
            and (self.faults[i].tensor, self.faults[i].layer) == (short, layer)
        ]

    def misread(self, short, layer, shape, ranges, read):
        """misplace on weights: the slice is read one row off, or one column where rows are cut
        by columns. Returns the (row range, column range) to read; ``read`` reads one."""
        for i in self._of_weights(("misplace",), short, layer):
            axis = 1 if ranges[1] else 0
            start, stop = ranges[axis] or (0, shape[axis])
            shift = 1 if stop < shape[axis] else -1
            moved = list(ranges)
            moved[axis] = (start + shift, stop + shift)
            # A norm whose weights are all equal is the same one element off.
            self.changed[i] = read(*moved).tobytes() != read(*ranges).tobytes()
            return tuple(moved)
        return ranges

    def weights(self, short, layer, raw):
        """bitflip and swap on a slice of weights that was just read; returns the slice."""
        for i in self._of_weights(("bitflip", "swap"), short, layer):
            fault, part = self.faults[i], self._parts[i]
            raw = np.array(raw)
            before = raw.tobytes()
            flat = raw.reshape(-1)
            place = self._locate(i, fault.element, raw, part.rows.start)
            if fault.kind == "bitflip":
                _flip(flat, place, fault.bit)
            else:
                other = self._locate(i, fault.other, raw, part.rows.start)
                _swap(flat, place, other if fault.other is not None else None)
            self.changed[i] |= raw.tobytes() != before
        return raw

    def _done(self, i, changed) -> None:
        self._pending.discard(i)
        self.changed[i] |= bool(changed)

    def _locate(self, i, element, array, first_row):
        """Flat index in the array of a global linear index; None where it is not in it."""
        part = self._parts[i]
        row, column = part.local(part.first if element is None else element)
        row += part.rows.start - first_row
        if not 0 <= row < array.shape[0]:
            return None
        return row * (array.size // array.shape[0]) + column


def _words(flat):
    return flat.view(f"u{flat.itemsize}")


def _flip(flat, place, bit) -> None:
    words = _words(flat)
    words[place] ^= words.dtype.type(1 << bit)


def _swap(flat, place, other) -> None:
    """Exchange two elements; without ``other`` the next one that differs."""
    words = _words(flat)
    if other is None:
        differing = np.flatnonzero(words != words[place])
        if not differing.size:
            return
        later = differing[differing > place]
        other = int(later[0] if later.size else differing[0])
    words[[place, other]] = words[[other, place]]
