"""What a verdict says of itself, and that the error which carries it keeps it."""

import copy
import pickle

import numpy as np
import pytest

from spimpi import CorruptionError, Tag, UsageError, Verdict
from spimpi.checks.check import Check, Rule
from spimpi.checks.pending import built
from spimpi.checks.verdict import ElementError, Where
from spimpi.fingerprint.arrays import share_memory
from spimpi.trace.schema import Established


def _failed(n, n_wrong=None):
    elements = tuple(ElementError((i,), b"\0", b"\1", 0) for i in range(n))
    where = Where("c", "t", 0, -1, -1, 0, "", 0, "", "", elements=elements, n_wrong=n_wrong)
    return Verdict(False, Established(0), where)


@pytest.mark.parametrize(
    ("n", "n_wrong", "end"),
    [
        (3, None, "(bits 0)"), (3, 3, "(bits 0)"), (4, None, "; at least 1 more"),
        (4, 4, "; 1 more"), (16, 4096, "; 4,093 more"), (0, 7, "c failed"),
    ],
)  # fmt: skip
def test_a_failure_says_how_many_elements_are_not_shown(n, n_wrong, end):
    assert str(_failed(n, n_wrong)).endswith(end)


def test_what_was_not_compared_comes_first_and_the_rest_after_it():
    some = Verdict(True, Established.MOVED, missing=("2 are not",), strength="s")
    assert some and str(some) == "incomplete: 2 are not; the rest is verified (moved; s)"
    none = Verdict(True, Established(0), missing=("nothing",))
    assert none and str(none) == "incomplete: nothing"


@pytest.mark.parametrize("copied", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_copied_error_carries_its_verdict(copied):
    error = copied(CorruptionError(_failed(2, 2)))
    assert error.verdict == _failed(2, 2) and str(error) == str(error.verdict)


def test_memory_is_shared_where_a_byte_is():
    x = np.arange(24.0).reshape(4, 6)
    for a, b, shared in (
        (x, x, True), (x[1:3], x[2:], True), (x[:2], x[2:], False), (x[:, ::2], x[:, 1::2], False),
        (x[::-1], x[:1], True), (x[:, :3], x[:, 3:], False), (x.T, x[2], True),
        (x, x.copy(), False), (x[:0], x, False), (np.broadcast_to(x[0], (9, 6)), x[0, :1], True),
        (x.view(np.uint8)[:, 1:2], x, True),
    ):  # fmt: skip
        assert share_memory(a, b) is share_memory(b, a) is shared


@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError, RuntimeError, MemoryError])
def test_an_error_of_a_checks_local_part_is_kept_for_all_ranks_to_raise(kind):
    def build(check):
        raise kind("no such thing")

    check = Check("broadcast", Tag(name="hidden"), Rule.AGREED, Established.MOVED)
    error = built(check, build).error
    assert isinstance(error, UsageError) and f"{kind.__name__}: " in str(error)
