"""Functions and communicators of the running program, patched for the length of a ``with``.

A place is "module:function", "module:Class.method", or "tensor.Allreduce": a method of one of a
DistributedContext's communicators. All that is patched calls its listeners, which see each call
before it runs, run it, and may change what goes in and what comes out.
"""

import inspect
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module

import numpy as np

from spimpi.context import COMMUNICATORS, DistributedContext


class Call:
    """One call of a patched function, as a listener sees it.

    ``call["name"]`` is an argument, ``proceed()`` runs the call, ``result`` is what it gave; ``now``
    is where the run stands (Now).
    """

    def __init__(self, now, names, inner, args, kwargs):
        self.now, self._inner, self.result = now, inner, None
        self.args, self.kwargs = list(args), dict(kwargs)
        self._names = names

    def _at(self, name) -> int:
        return self._names.index(name)

    def __getitem__(self, name):
        if isinstance(name, int):
            return self.args[name]
        if name in self.kwargs:
            return self.kwargs[name]
        return self.args[self._at(name)]

    def __setitem__(self, name, value):
        if name in self.kwargs:
            self.kwargs[name] = value
        else:
            self.args[name if isinstance(name, int) else self._at(name)] = value

    @property
    def owner(self):
        """The object whose method is called."""
        return self.args[0]

    def proceed(self):
        self.result = self._inner(*self.args, **self.kwargs)
        return self.result


class Now:
    """Where the run stands on this rank: its step, layer and microbatch, -1 where it is in none."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.step = self.layer = self.microbatch = -1
        self.part = "start"
        self.stage = None  # inference.model.Stage, once there is one

    @property
    def key(self) -> tuple:
        return self.part, self.step, self.layer, self.microbatch


@lru_cache(maxsize=None)
def _names_of(function) -> tuple[str, ...]:
    function = getattr(function, "py_func", function)  # a numba kernel's
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of C: by position alone
        return ()


@contextmanager
def patched(now: Now, listeners: dict):
    """While inside, each call of ``place`` goes through ``listeners[place]`` (callables of a Call,
    the first outermost)."""
    undo = []
    on_comms = {place: heard for place, heard in listeners.items() if ":" not in place}
    try:
        for place, heard in listeners.items():
            if place not in on_comms:
                owner, name = _owner_of(place)
                original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
                undo.append((owner, name, original))
                setattr(owner, name, _wrapper(now, original, heard))
        if on_comms:
            original = DistributedContext.__init__
            undo.append((DistributedContext, "__init__", original))
            DistributedContext.__init__ = _with_proxies(now, original, on_comms)
        yield
    finally:
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)


def _owner_of(place):
    module, _, path = place.partition(":")
    owner = import_module(module)
    *outer, name = path.split(".")
    for one in outer:
        owner = getattr(owner, one)
    return owner, name


def _wrapper(now, original, heard):
    names = _names_of(original)

    def run(*args, **kwargs):
        inner = original
        for listener in reversed(heard):
            inner = _through(now, names, inner, listener)
        return inner(*args, **kwargs)

    return run


def _through(now, names, inner, listener):
    def run(*args, **kwargs):
        call = Call(now, names, inner, args, kwargs)
        listener(call)
        return call.result

    return run


class Proxy:
    """A communicator some of whose methods are patched."""

    def __init__(self, comm, methods):
        self._comm = comm
        for name, wrap in methods.items():
            setattr(self, name, wrap(getattr(comm, name)))

    def __getattr__(self, name):
        return getattr(self._comm, name)


def _with_proxies(now, original, on_comms):
    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        for axis in COMMUNICATORS:
            methods = {
                place.partition(".")[2]: (lambda real, heard=heard: _wrapper(now, real, heard))
                for place, heard in on_comms.items() if place.partition(".")[0] == axis
            }  # fmt: skip
            if methods:
                setattr(self, axis, Proxy(getattr(self, axis), methods))

    return init


def bits_of(value) -> bytes:
    """All bits of an array, a number, or a nest of them, to be compared."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return repr(sorted((k, bits_of(v)) for k, v in value.items())).encode()
    if isinstance(value, (list, tuple)):
        return b"".join(bits_of(v) + b"|" for v in value)
    return repr(value).encode()
