"""Fingerprints of what exact arithmetic derives from a checkpoint's matrices (docs/manifest.md).

Read as the tensors themselves, but in whole rows: a row is scaled with its own largest element.
"""

from dataclasses import replace

import numpy as np

from spimpi.errors import UsageError
from spimpi.fingerprint import xor_flat
from spimpi.fingerprint.arrays import dtype_of
from spimpi.inference.checkpoint import byte_share
from spimpi.inference.derived import STORED, derived_names, is_matrix, scaled
from spimpi.inference.exact import ARITHMETIC
from spimpi.manifest.format import Derived, TensorFacts, content_key
from spimpi.manifest.read import BLOCK_BYTES, Block, shares_over
from spimpi.manifest.source import Source


def matrices(source: Source) -> Source:
    """The source's matrices alone. UsageError where it has none."""
    found = {
        name: place
        for name, place in source.tensors.items()
        if is_matrix(place.facts.shape, place.facts.stored.numpy_name)
    }
    if not found:
        msg = (
            f"nothing to derive (--derived): expected tensors of two axes in {', '.join(STORED)}, "
            f"found none in {', '.join(source.files)}"
        )
        raise UsageError(msg)
    return replace(source, tensors=found)


def derived_facts(source: Source) -> dict[str, TensorFacts]:
    """The derived tensors of a source of matrices, without fingerprints."""
    facts = {}
    for name, place in source.tensors.items():
        integers, exponents = derived_names(name)
        facts[integers] = TensorFacts("F32", place.facts.shape)
        facts[exponents] = TensorFacts("I32", place.facts.shape[:1])
    return facts


def derived_shares(
    source: Source, seed: int, *, part: int = 0, n_parts: int = 1, threads: int = 1, progress=None
) -> dict[str, int]:
    """Each derived tensor's share of its fingerprint in part ``part`` of ``n_parts`` of the rows.

    ``source``: of matrices. As read.fingerprint_shares. Raises UsageError for a row with NaN or
    Inf, which has no scaled integers.
    """
    keys = {name: content_key(seed, name, facts) for name, facts in derived_facts(source).items()}

    def shares_of(block: Block, words: np.ndarray) -> dict[str, int]:
        n_inputs = block.place.facts.shape[1]
        row = block.first // n_inputs
        raw = words.view(dtype_of(block.place.facts.stored.numpy_name)).reshape(-1, n_inputs)
        integers, exponents, n_bad, first = scaled(raw, n_inputs)
        if n_bad:
            msg = (
                f"{block.place.path}: row {row + first} of tensor {block.name} holds NaN or Inf, so "
                "that it has no scaled integers: leave out --derived"
            )
            raise UsageError(msg)
        names = derived_names(block.name)
        return {
            names[0]: xor_flat(integers.reshape(-1).view(np.uint32), keys[names[0]], block.first),
            names[1]: xor_flat(exponents.view(np.uint32), keys[names[1]], row),
        }

    return shares_over(keys, _blocks(source, part, n_parts), shares_of, threads, progress)


def derived_of(source: Source, words: dict[str, int]) -> Derived:
    """What a manifest says of the derived tensors of a source of matrices."""
    facts = derived_facts(source)
    return Derived(ARITHMETIC, {n: replace(f, fingerprint=words[n]) for n, f in facts.items()})


def _blocks(source: Source, part: int, n_parts: int) -> list[Block]:
    """Whole rows: a row belongs to the part in which its first element lies."""
    records = {name: place.record for name, place in source.tensors.items()}
    blocks = []
    for name, start, stop in byte_share(records, part, n_parts):
        n_inputs, wordsize = records[name].shape[1], records[name].itemsize
        first_row, last_row = -(-start // n_inputs), -(-stop // n_inputs)
        step = max(1, BLOCK_BYTES // (n_inputs * wordsize))
        for row in range(first_row, last_row, step):
            count = min(step, last_row - row) * n_inputs
            blocks.append(Block(name, source.tensors[name], wordsize, row * n_inputs, count))
    return blocks
