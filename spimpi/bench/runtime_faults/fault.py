"""What a fault is, and the hand with which it changes arrays.

A fault patches one place; its ``strike(call, hand)`` is what one chosen call of that place becomes
on the rank that is struck. ``before``, ``after`` and ``within`` make the usual ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from spimpi.bench.runtime_faults.hooks import Call, bits_of


# Why a fault may go unseen without a golden run (docs/what-pass-means.md).
IN_ATTENTION = "inside attention's kernel: it takes the words of what it read and of what it made"
IN_A_SUM = "inside the kernel of SwiGLU or of a residual sum: it takes the word of what it made"
SCALED_BACK = "from a product's integer to its float32: one read serves its check and this step"


class Hand:
    """Changes things, and remembers whether any bit came out different."""

    def __init__(self, rng):
        self.rng, self.struck = rng, False

    def edit(self, array, how=None) -> None:
        """Change an array in place, by ``how(array, rng)``."""
        before = bits_of(array)
        (how or nudge)(array, self.rng)
        self.struck |= bits_of(array) != before

    def swapped_for(self, old, new):
        """``new``, which takes the place of ``old``."""
        self.struck |= bits_of(old) != bits_of(new)
        return new


@dataclass(frozen=True)
class Fault:
    """One fault.

    kind: what faults of its sort have in common, for the tables. shows: the tensors whose check
    should be the first to see it, in the step and layer where it strikes (``later``: or the step
    before or after it); "weights": any tensor of the checkpoint. only: which calls of the place it
    can strike. alike: it strikes all tensor ranks of a group in the same way. fits: in which modes
    it can strike. why: why it may go unseen without a golden run although text or logits differ; ""
    where it must not. harmless: it changes a check's own words and nothing that is computed.
    """

    name: str
    kind: str
    place: str
    strike: Callable[[Call, Hand], None]
    shows: tuple[str, ...] = ()
    only: Callable[[Call], bool] = lambda call: True
    alike: bool = False
    fits: Callable = lambda mode: True
    later: bool = False
    why: str = ""
    harmless: bool = False


def alike(fault: Fault, **changes) -> Fault:
    """The same on all tensor ranks of a group at once: their copies stay equal."""
    fits = fault.fits
    facts = dict(name=f"{fault.name}, alike on all tensor ranks", alike=True,
                 fits=lambda mode: fits(mode) and mode.grid.tp > 1)  # fmt: skip
    return replace(fault, **(facts | changes))


def _target(call, what):
    if callable(what):
        return what(call)
    return call.result if what == "result" else call[what]


def before(*what, how=None):
    """Change arguments (names, or functions of the call) before the call runs."""

    def strike(call, hand):
        for one in what:
            hand.edit(_target(call, one), how)
        call.proceed()

    return strike


def after(*what, how=None):
    """Change arguments, or "result", after the call ran."""

    def strike(call, hand):
        call.proceed()
        for one in what:
            hand.edit(_target(call, one), how)

    return strike


def returned(make):
    """``make(result, rng)`` is returned in place of the result."""

    def strike(call, hand):
        result = call.proceed()
        call.result = hand.swapped_for(result, make(result, hand.rng))

    return strike


def given(name, make):
    """``make(argument, rng)`` is given in place of an argument."""

    def strike(call, hand):
        call[name] = hand.swapped_for(call[name], make(call[name], hand.rng))
        call.proceed()

    return strike


# Changes: all work in place on an array of any dtype


def nudge(array, rng):
    """One element visibly other: a float off by a quarter of the largest, an integer by one bit."""
    flat = _flat(array)
    if not flat.size:
        return
    at = int(rng.integers(flat.size))
    kind = flat.dtype.kind
    if kind == "f":
        largest = float(np.abs(flat[np.isfinite(flat)]).max(initial=0)) or 1.0
        moved = flat[at] + largest / 4
        if (np.rint(flat) == flat).all() and largest > 4:  # scaled integers stay integers
            moved = np.rint(moved)
        flat[at] = moved
    elif kind == "b":
        flat[at] = not flat[at]
    else:
        flat[at] ^= flat.dtype.type(1 << int(rng.integers(2, 8)))
    _put_back(array, flat)


def plus_one(array, rng):
    """One integer (an exponent, an index) one larger."""
    flat = _flat(array)
    if flat.size:
        flat[int(rng.integers(flat.size))] += 1
    _put_back(array, flat)


def larger_maximum(array, rng):
    """A row's maximum, as bits, of another power of two."""
    flat = _flat(array)
    if flat.size:
        flat[int(rng.integers(flat.size))] += 3 << 23
    _put_back(array, flat)


def swapped_rows(array, rng):
    """Two rows in each other's place."""
    if len(array) > 1:
        i, j = rng.choice(len(array), 2, replace=False)
        array[[i, j]] = array[[j, i]]


def zeros(array, rng):
    array[...] = 0


def another_id(array, rng):
    """One token id another one of a small vocabulary."""
    flat = _flat(array)
    if flat.size:
        at = int(rng.integers(flat.size))
        flat[at] = (flat[at] + 5) % 37
    _put_back(array, flat)


def _flat(array):
    return array.reshape(-1) if array.flags.c_contiguous else array.flatten()


def _put_back(array, flat):
    if not array.flags.c_contiguous:
        array[...] = flat.reshape(array.shape)
