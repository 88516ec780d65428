"""What each check sees and misses: every check × every fault × dtypes × numbers of ranks.

Two routes. In one process the public functions are called for all ranks in turn (one_process.py):
that is fast enough for two million trials. On 8 real ranks (confusion_ranks.py) the same trials go
through MPI, fewer of them, and verdicts are carried to their end. docs/what-pass-means.md has the
tables (matrix.py), docs/confusion-matrix.csv every cell.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from spimpi.bench.cases import (
    BOUND, DTYPES, FLOATS, IN_ONE_PROCESS, PAINTED, PAINTING, SHARDS,
)  # fmt: skip
from spimpi.bench.matrix import ONE_PROCESS, SIZES, UPPER_BITS, tables, write
from spimpi.bench.planted import MOVEMENT, words_of
from spimpi.bench.scenes import CLEAN, Scene

SEED = 1069
RANKS = 8
OTHERS = 80, 1600  # trials and clean ones of today's checksums, for each dtype and number of ranks
PAINTED_ELEMENTS, PAINTED_ROUNDS = 1 << 20, 4
SIZE_TRIALS = 1000


def measure(output: str | None = None) -> dict:
    """The tables as Markdown; ``output``: a file for the whole matrix. Takes minutes. Local."""
    rows = in_one_process() + on_ranks()
    if output:
        write(output, rows)
    return {title: f"\n\n{table}\n" for title, table in tables(rows).items()}


def in_one_process(share: float = 1.0) -> list:
    """Rows (route, check, fault, dtype, ranks, missed, tried); ``share`` of all trials."""
    jobs = [
        partial(case_rows, case.name, dtype, share)
        for case in IN_ONE_PROCESS for dtype in case.dtypes
    ]  # fmt: skip
    jobs += [partial(others_rows, dtype, share) for dtype in DTYPES]
    jobs += [partial(painting_rows, dtype) for dtype in PAINTED]
    jobs += [partial(size_rows, dtype, share) for dtype in FLOATS]
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(chain.from_iterable(pool.map(_run, jobs)))


def _run(job) -> list:
    with np.errstate(all="ignore"):  # what faults make of floats is not worth a warning
        return job()


def on_ranks() -> list:
    """As ``in_one_process``, from 8 ranks that the mpirun on PATH starts."""
    from spimpi.bench.startup import launcher
    from spimpi.errors import UsageError

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        program = [sys.executable, "-m", "mpi4py", "-m", "spimpi.bench.confusion_ranks", str(path)]
        command = [*launcher(RANKS), *program]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        if done.returncode:
            msg = f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-800:]}"
            raise UsageError(msg)
        return [tuple(row) for row in json.loads(path.read_text())]


def case_rows(name: str, dtype: str, share: float = 1.0) -> list:
    """A check's trials with one dtype, on all numbers of ranks."""
    from spimpi.bench.one_process import Ranks

    case = next(case for case in IN_ONE_PROCESS if case.name == name)
    rows = []
    for n in SHARDS:
        ranks = Ranks(n)
        for fault in (*case.faults, CLEAN):
            rng = generator(name, dtype, n, fault)
            wanted = max(1, round(share * (case.clean if fault == CLEAN else case.trials)))
            scenes = [Scene(dtype, n, fault, rng) for _ in range(wanted)]
            if case.hold:
                held = case.hold(scenes, ranks)
            else:
                held = [_holds(ranks, case, s) for s in scenes]
            counted = [h for h, s in zip(held, scenes) if s.changed]
            missed = sum(h != (fault == CLEAN) for h in counted)
            rows.append((ONE_PROCESS, name, fault, dtype, n, missed, len(counted)))
    return rows


def _holds(ranks, case, s: Scene) -> bool:
    call, callers = case.trial(s)
    return not s.changed or ranks.holds(call, callers, s.rounds)


def generator(*names) -> np.random.Generator:
    """Random numbers of a cell, the same in every run."""
    return np.random.default_rng([SEED, *repr(names).encode()])


# What people use today


def xor_of_words(x) -> int:
    """What a plain checksum does: XOR of 8-byte words, the rest zero-padded."""
    data = np.ascontiguousarray(x).tobytes()
    data += b"\0" * (-len(data) % 8)
    return int(np.bitwise_xor.reduce(np.frombuffer(data, np.uint64)))


def sum_of_words(x) -> int:
    """Sum of the elements' bits modulo 2**64."""
    return int(words_of(np.ascontiguousarray(x)).sum(dtype=np.uint64))


def todays_checksums() -> dict:
    """name -> digest of an array; torch.hash_tensor where there is a torch that has it."""
    checksums = {"XOR of words": xor_of_words, "sum of words": sum_of_words}
    try:
        import torch

        hash_tensor = torch.hash_tensor
    except (ImportError, AttributeError):
        return checksums

    def digest(x):
        words = words_of(np.array(x))  # torch takes no read-only array
        signed = words.view(f"i{words.itemsize}" if words.itemsize > 1 else "u1")
        return int(hash_tensor(torch.from_numpy(signed)).numpy())

    return {"torch.hash_tensor": digest, **checksums}


def others_rows(dtype: str, share: float = 1.0) -> list:
    """Today's checksums of a tensor whose shard arrived with a fault."""
    digests, rows = todays_checksums(), []
    for n in SHARDS:
        for fault in (*MOVEMENT, CLEAN):
            rng = generator("others", dtype, n, fault)
            missed, tried = dict.fromkeys(digests, 0), 0
            for _ in range(max(1, round(share * OTHERS[fault == CLEAN]))):
                s = Scene(dtype, n, fault, rng)
                wrong = s.wrong_whole()
                tried += s.changed
                for name, digest in digests.items():
                    same = digest(wrong) == digest(s.whole)
                    missed[name] += s.changed and same != (fault == CLEAN)
            rows += [
                (ONE_PROCESS, name, fault, dtype, n, int(missed[name]), tried) for name in digests
            ]
    return rows


# Painting's rate, and sums by the size of the error


def painting_rows(dtype: str) -> list:
    """Random changes of the bits above the colour, in each of many elements, looked at one by one."""
    from spimpi.fingerprint.arrays import dtype_of
    from spimpi.fingerprint.painting import check_colors, color_hidden_states, coloured_bits
    from spimpi.fingerprint.tag import Tag
    from spimpi.partition import TensorPartition

    rows, kind = [], dtype_of(dtype)
    m = coloured_bits(kind)
    for n in SHARDS:
        rng, seen, tried = generator(dtype, n), 0, 0
        for step in range(PAINTED_ROUNDS):
            tag = Tag(name="hidden", step=step)
            x = rng.standard_normal(PAINTED_ELEMENTS).astype(kind)
            words = words_of(color_hidden_states(x, tag))
            above = rng.integers(1, 1 << (8 * kind.itemsize - m), x.size, words.dtype)
            words ^= above << words.dtype.type(m)
            for rank in range(n):
                part = TensorPartition(0, n, rank, x.size)
                seen += check_colors(x[part.start : part.stop], tag, part).n_corrupted
            tried += x.size
        rows.append((ONE_PROCESS, PAINTING.name, UPPER_BITS, dtype, n, tried - seen, tried))
    return rows


def size_rows(dtype: str, share: float = 1.0) -> list:
    """One wrong element, by how far off it is in units of the size that a clean verdict states."""
    from spimpi.bench.computed_trials import addends, allreduce
    from spimpi.bench.one_process import Ranks

    rows = []
    for n in SHARDS:
        ranks, rng = Ranks(n), generator("size", dtype, n)
        counts = {name: [0, 0] for _, name in SIZES}
        for _ in range(max(1, round(share * SIZE_TRIALS))):
            s = Scene(dtype, n, CLEAN, rng)
            parts = addends(s)
            call, _ = allreduce(s, parts)
            clean = ranks.verdict(call, rounds=s.rounds)
            stated = float(clean.strength.split("more than ")[1].split(")")[0])
            off = []
            s.plant = partial(_moved, by=stated * 2 ** rng.uniform(-6, 3), off=off)
            call, _ = allreduce(s, parts)
            name = next(name for limit, name in SIZES if off[0] <= limit * stated)
            counts[name][0] += s.changed and ranks.holds(call, rounds=s.rounds)
            counts[name][1] += s.changed
        rows += [(ONE_PROCESS, BOUND.name, name, dtype, n, *counts[name]) for name in counts]
    return rows


def _moved(shard, rng, by, off, **_) -> None:
    """Add ``by`` to one item; ``off`` gets by how much it has then moved."""
    items = shard.reshape(-1).view(shard.real.dtype)
    place = int(rng.integers(items.size))
    before = float(items[place])
    items[place] += items.dtype.type(by)
    off.append(abs(float(items[place]) - before))
