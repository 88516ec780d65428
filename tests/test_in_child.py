"""A child's value comes back; its crashes, memory and time are its own."""

import os
import resource
import signal
import time

import numpy as np
import pytest

from spimpi import in_child as module
from spimpi.errors import UsageError
from spimpi.in_child import in_child

MEMORY = 1 << 28


def test_a_value_comes_back_as_it_was_made():
    big = in_child(lambda: {"a": np.arange(3_000_000), "b": (1, "é")}, MEMORY, 10)
    assert big["b"] == (1, "é") and (big["a"] == np.arange(3_000_000)).all()


def raises(error):
    raise error


@pytest.mark.parametrize("error", [UsageError("mine"), ValueError("mine"), KeyError("mine")])
def test_errors_come_back_with_their_words(error):
    with pytest.raises(ValueError, match="mine") as caught:
        in_child(lambda: raises(error), MEMORY, 10)
    assert isinstance(caught.value, UsageError) == isinstance(error, UsageError)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_is_told(number, capfd):
    with pytest.raises(ValueError, match=f"crashed: {number.name}"):
        in_child(lambda: (os.write(2, b"noise"), os.kill(os.getpid(), number)), MEMORY, 10)
    assert capfd.readouterr() == ("", "")


def test_an_end_of_its_own_is_a_crash():
    with pytest.raises(ValueError, match="status 4"):
        in_child(lambda: raises(SystemExit()), MEMORY, 10)


def forever():
    while True:
        pass


def test_what_does_not_end_is_ended(monkeypatch):
    with pytest.raises(ValueError, match="for ever"):
        in_child(forever, MEMORY, 1)
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    with pytest.raises(ValueError, match="for ever"):
        in_child(lambda: time.sleep(60), MEMORY, 10)


def test_memory_is_bounded_in_the_child_alone():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match="MemoryError|allocate"):
        in_child(lambda: len(bytearray(2 * MEMORY)), MEMORY, 10)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
