"""Fingerprints of stored tensors, read block by block by the threads of one process.

The bytes of all tensors, end to end, are cut in equal ranges over processes, and each range in
blocks that the threads take one after the other: constant memory, sequential reading, and one
thread's reading goes on while another fingerprints.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np

from spimpi.errors import UsageError
from spimpi.fingerprint import xor_flat
from spimpi.fingerprint.arrays import check_threads
from spimpi.inference.checkpoint import byte_share
from spimpi.launch import launch, usable_cores
from spimpi.manifest.format import content_key
from spimpi.manifest.source import Place, Source

# Half of what a core's second-level cache has: what was read is there when it is fingerprinted.
BLOCK_BYTES = 1 << 20
MOST_THREADS = 1024


@dataclass(frozen=True)
class Block:
    """Words of a stored tensor that are read at once."""

    name: str
    place: Place
    wordsize: int
    first: int  # word of the tensor
    count: int  # words

    @property
    def n_bytes(self) -> int:
        return self.count * self.wordsize


def default_threads() -> int:
    """This process's share of the cores: those it may use, over the ranks on its node."""
    found = launch()
    ranks = (found.local_size or found.size or 1) if found else 1
    return max(1, usable_cores() // ranks)


def fingerprint_shares(
    source: Source,
    seed: int,
    *,
    part: int = 0,
    n_parts: int = 1,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Each tensor's share of its content fingerprint in byte range ``part`` of ``n_parts``.

    Over all parts the shares XOR to the fingerprints; tensors outside the range have 0.
    ``progress(done, total)``, in bytes, is called after each block, by any thread. Raises
    UsageError where a file cannot be read, or has another size than when its header was read.
    """
    keys = {name: content_key(seed, name, p.facts) for name, p in source.tensors.items()}

    def shares_of(block: Block, words: np.ndarray) -> dict[str, int]:
        return {block.name: xor_flat(words, keys[block.name], block.first)}

    return shares_over(keys, _blocks(source, part, n_parts), shares_of, threads, progress)


def shares_over(names, blocks: list[Block], shares_of, threads: int, progress=None):
    """The XOR of ``shares_of(block, its words)``, a dict by name, over all blocks.

    ``threads`` threads take the blocks one after the other. Names without a share have 0.
    """
    check_threads(threads)
    threads = min(threads, max(len(blocks), 1), MOST_THREADS)
    queue = _Queue(blocks, progress)

    def work() -> dict[str, int]:
        shares: dict[str, int] = {}
        try:
            with _Files() as files:
                for block in queue:
                    for name, share in shares_of(block, files.read(block)).items():
                        shares[name] = shares.get(name, 0) ^ share
                    queue.finished(block)
            return shares
        finally:
            queue.close()  # after an error the other threads need not go on

    total = dict.fromkeys(names, 0)
    for shares in _on_threads(work, threads, queue):
        for name, share in shares.items():
            total[name] ^= share
    return total


def _on_threads(work, threads: int, queue) -> list:
    if threads == 1:
        return [work()]
    with ThreadPoolExecutor(threads, thread_name_prefix="spimpi-manifest") as pool:
        try:
            return [future.result() for future in [pool.submit(work) for _ in range(threads)]]
        finally:
            queue.close()  # when interrupted


class _Queue:
    """Blocks that threads take one after the other, and how far they are."""

    def __init__(self, blocks: list[Block], progress):
        self._blocks, self._lock, self._progress = iter(blocks), Lock(), progress
        self._done, self._total = 0, sum(block.n_bytes for block in blocks)

    def __iter__(self):
        return self

    def __next__(self) -> Block:
        with self._lock:
            return next(self._blocks)

    def finished(self, block: Block) -> None:
        if self._progress:
            with self._lock:
                self._done += block.n_bytes
                self._progress(self._done, self._total)

    def close(self) -> None:
        with self._lock:
            self._blocks = iter(())


def _blocks(source: Source, part: int, n_parts: int) -> list[Block]:
    records = {name: place.record for name, place in source.tensors.items()}
    blocks = []
    for name, start, stop in byte_share(records, part, n_parts):
        place, wordsize = source.tensors[name], records[name].itemsize
        step = BLOCK_BYTES // wordsize
        for first in range(start, stop, step):
            blocks.append(Block(name, place, wordsize, first, min(step, stop - first)))
    return blocks


class _Files:
    """One thread's open file and block of memory."""

    def __init__(self):
        self._path, self._descriptor = None, -1
        self._memory = np.empty(BLOCK_BYTES, np.uint8)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._close()

    def read(self, block: Block) -> np.ndarray:
        """The block's words; valid until the next call."""
        wordsize, count = block.wordsize, block.n_bytes
        if count > self._memory.size:  # a row longer than a block
            self._memory = np.empty(count, np.uint8)
        offset = block.place.offset + block.first * wordsize
        view = memoryview(self._memory)[:count]
        path = block.place.path
        try:
            self._open(path, block.place.file_bytes)
            done = 0
            while done < count:
                n = os.preadv(self._descriptor, [view[done:]], offset + done)
                if n == 0:
                    msg = (
                        f"{path} ended in tensor {block.name}: expected {count} bytes at offset "
                        f"{offset}, found {done}"
                    )
                    raise UsageError(msg)
                done += n
        except OSError as error:
            msg = f"{path}: tensor {block.name} cannot be read: {error.strerror}"
            raise UsageError(msg) from None
        return self._memory[:count].view(f"<u{wordsize}")

    def _open(self, path, n_bytes: int) -> None:
        if path == self._path:
            return
        self._close()
        self._descriptor, self._path = os.open(path, os.O_RDONLY | os.O_NONBLOCK), path
        found = os.fstat(self._descriptor).st_size
        if found != n_bytes:
            msg = (
                f"{path} has changed since its header was read: expected {n_bytes} bytes, found "
                f"{found}"
            )
            raise UsageError(msg)

    def _close(self) -> None:
        if self._path is not None:
            os.close(self._descriptor)
            self._path = None
