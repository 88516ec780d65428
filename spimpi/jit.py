"""How numba kernels are compiled here: ahead of use, once a node, cached on disk.

Every kernel carries explicit signatures, so importing its module compiles it or loads it from
the cache; nothing is compiled in the middle of a run. spimpi/kernel_cache.py says where compiled
kernels lie and when they are believed. Where they cannot be kept, they are compiled in memory.
"""

from spimpi import compiling

compiling.announce_cold_start()  # before numba's import, which takes seconds on a cold machine

import hashlib  # noqa: E402
import os  # noqa: E402
import pickle  # noqa: E402
import sys  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402

import numba  # noqa: E402
from numba.core.compiler import CompileResult  # noqa: E402
from numba.core.serialize import dumps  # noqa: E402

from spimpi import kernel_cache  # noqa: E402
from spimpi.errors import UsageError  # noqa: E402

if numba.config.DISABLE_JIT:
    msg = "spimpi's kernels need numba's compiler: unset NUMBA_DISABLE_JIT"
    raise UsageError(msg)


def kernel(*signatures, reassociate=False):
    """Compile a function for the given signatures now, without the GIL, cached.

    ``reassociate`` lets the compiler reorder sums and use FMA. It may be set only where no
    operation rounds (all values are integers of at most 2**53), for there it cannot change a bit.
    """
    fastmath = {"reassoc", "contract", "nsz"} if reassociate else False
    jit = numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)

    def compiled(function):
        dispatcher = jit(function)
        dispatcher._cache = _Cache(function)  # in the place of what cache=True makes
        for signature in signatures:
            dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return compiled


def inlined(function):
    """A helper that becomes part of each kernel that calls it."""
    return numba.njit(function, inline="never", nogil=True, error_model="numpy")


@cache
def _source_digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


class _Cache:
    """What a dispatcher asks for compiled code of a signature, and gives it to be kept.

    One file a signature, of a name that says all that its code depends on: processes that keep
    kernels at the same time can only write the same.
    """

    def __init__(self, function):
        code = function.__code__
        self._name = f"{Path(code.co_filename).stem}.{function.__qualname__}"
        self._facts = (
            function.__module__, function.__qualname__, code.co_firstlineno,
            _source_digest(code.co_filename), numba.__version__, sys.version,
        )  # fmt: skip

    @property
    def cache_path(self):
        return str(kernel_cache.usable_folder()[0] or "")

    def _file(self, signature, codegen) -> Path | None:
        folder, _ = kernel_cache.usable_folder()
        if folder is None:
            return None
        facts = repr((*self._facts, str(signature), codegen.magic_tuple()))
        name = self._name.replace("<", "").replace(">", "")
        digest = hashlib.sha256(facts.encode()).hexdigest()[:24]
        return folder / f"{name}-{digest}{kernel_cache.SUFFIX}"

    def load_overload(self, signature, target):
        """The compiled code, or None: it is then compiled."""
        target.refresh()
        path = self._file(signature, target.codegen())
        content = None if path is None else kernel_cache.read(path)
        if content is not None:
            try:
                return CompileResult._rebuild(target, *pickle.loads(content))
            except Exception:  # noqa: BLE001  of another build of numba or Python: compile anew
                pass
        compiling.compile_begins(self._name)
        return None

    def save_overload(self, signature, result) -> None:
        """Keep compiled code. A disk that is full or cannot be written costs the next start time."""
        path = self._file(signature, result.codegen)
        if path is None or result.lifted or result.library.has_dynamic_globals:
            return
        try:
            kernel_cache.write(path, dumps(result._reduce()))
        except OSError as error:
            compiling.say_not_kept(f"{path.parent}: {os.strerror(error.errno or 0)}")

    def flush(self) -> None:
        """``recompile()`` of a dispatcher: its files are written again."""
