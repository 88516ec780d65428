"""CPU fingerprints against the read bandwidth of the same threads, in turn, best of several."""

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

from spimpi.fingerprint import xor_flat
from spimpi.jit import kernel

N_BYTES = 256 << 20
ROUNDS = 9


@kernel("u8(u8[::1])")
def read(words):
    """XOR of all words: as little arithmetic as a read can have."""
    total = np.uint64(0)
    for i in range(words.shape[0]):
        total ^= words[i]
    return total


def _read_threads(words, pool, threads):
    if threads == 1:
        return read(words)
    return list(pool.map(read, np.array_split(words, threads)))


def _torch_hash(data):
    """torch.hash_tensor of float32 data on so many threads; None without a torch that has it."""
    try:
        import torch

        hash_tensor = torch.hash_tensor
    except (ImportError, AttributeError):
        return None
    tensor = torch.from_numpy(data.view(np.float32))

    def digest(threads):
        torch.set_num_threads(threads)
        return hash_tensor(tensor)

    return digest


def measure(comm) -> dict:
    """GB/s and elements/s on one and two threads. Every rank measures; rank 0's are printed."""
    data = np.random.default_rng(1069).integers(0, 1 << 63, N_BYTES // 8, dtype=np.uint64)
    figures, torch_hash = {}, _torch_hash(data)
    with ThreadPoolExecutor(2) as pool:
        for threads in (1, 2):
            best = {}
            for _ in range(ROUNDS):
                # In turn, so that a slow moment of a shared machine meets all of them.
                _time(best, "read", lambda t=threads: _read_threads(data, pool, t))
                for size in (8, 4, 2, 1):
                    words = data.view(f"u{size}")
                    _time(best, size, lambda w=words, t=threads: xor_flat(w, 1, 0, t))
                if torch_hash:
                    _time(best, "torch", lambda t=threads: torch_hash(t))
            bandwidth = N_BYTES / best["read"] / 1e9
            figures[f"read, {threads} thread(s), GB/s"] = round(bandwidth, 1)
            if torch_hash:
                faster = best["torch"] / best[4]
                name = f"torch.hash_tensor / fingerprint, float32, {threads} thread(s), time"
                figures[name] = round(faster, 2)
            for size in (8, 4, 2, 1):
                rate = N_BYTES / best[size] / 1e9
                name = f"fingerprint of {size}-byte items, {threads} thread(s)"
                figures[f"{name}, ratio to read"] = round(rate / bandwidth, 3)
                figures[f"{name}, GB/s"] = round(rate, 1)
                figures[f"{name}, Gelements/s"] = round(rate / size, 2)
    comm.Barrier()
    return figures


def _time(best, name, work):
    start = perf_counter()
    work()
    best[name] = min(best.get(name, 1e9), perf_counter() - start)
