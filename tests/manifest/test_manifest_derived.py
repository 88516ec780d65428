"""Derived tensors of a manifest: what plain fractions give, whoever reads which rows."""

import json
import struct
from fractions import Fraction
from math import frexp

import ml_dtypes
import numpy as np
import pytest
from manifest_samples import tensors, write_file

from spimpi.errors import UsageError
from spimpi.fingerprint import combine, reference
from spimpi.fingerprint.tag import Tag
from spimpi.manifest import check_files, derive, make_manifest, read_manifest, write_manifest
from spimpi.manifest.format import parse
from spimpi.manifest.source import survey

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
# The bits that docs/exact-arithmetic.md gives for these inner sizes.
BITS = {1: 24, 7: 24, 32: 24, 33: 23, 100: 23}
SHAPES = {"a": (5, 7), "b": (3, 33), "c": (4, 32), "d": (1, 100), "e": (6, 1)}


def content(seed=1):
    """A matrix of each shape in each dtype: values of any size, a row of zeros, denormals."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in SHAPES.items():
        for stored, dtype in DTYPES.items():
            x = rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 12, (shape[0], 1))
            if shape[0] > 2:
                x[1], x[2] = 0, x[2] * 2.0**-19
            data = x.astype(dtype)
            if shape[0] > 2:
                data[0, -1] = -0.0
            made[f"{name}.{stored}"] = (stored, shape, data.tobytes())
    return made


MATRICES = content()
OTHERS = tensors({"norm": ("BF16", (8,)), "ids": ("I64", (2, 9)), "none": ("F32", (0, 4)),
                  "conv": ("F32", (2, 3, 4)), "step": ("F64", (2, 2))})  # fmt: skip


def float32_bits(value) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def oracle(name, stored, shape, data, seed=1069):
    """(word of the integers, word of the exponents), in fractions and plain integers."""
    rows = np.frombuffer(data, DTYPES[stored]).astype(float).reshape(shape).tolist()
    b = BITS[shape[1]]
    exponents = [frexp(max(map(abs, row)))[1] for row in rows]
    integers = [
        round(Fraction(x) * Fraction(2) ** (b - e)) for row, e in zip(rows, exponents) for x in row
    ]
    words = (
        (shape, ((i, float32_bits(float(q))) for i, q in enumerate(integers))),
        (shape[:1], ((i, e % 2**32) for i, e in enumerate(exponents))),
    )
    names = (f"{name} exact-1 integers", f"{name} exact-1 exponents")
    return {n: reference.fingerprint(Tag(seed, n), s, 4, w) for n, (s, w) in zip(names, words)}


def expected(seed=1069):
    return {k: w for n, facts in MATRICES.items() for k, w in oracle(n, *facts, seed).items()}


@pytest.fixture
def model(tmp_path):
    return write_file(tmp_path / "model.safetensors", MATRICES | OTHERS)


def words(tensors):
    return {name: facts.fingerprint for name, facts in tensors.items()}


def test_fingerprints_are_those_of_rows_scaled_in_fractions(model):
    made = make_manifest(model, derived=True)
    assert made.derived.arithmetic == "exact-1"
    assert words(made.derived.tensors) == expected()
    assert words(make_manifest(model, derived=True, seed=7).derived.tensors) == expected(7)
    assert make_manifest(model).derived is None
    assert made.tensors == make_manifest(model).tensors
    kinds = {(f.dtype, len(f.shape)) for f in made.derived.tensors.values()}
    assert kinds == {("F32", 2), ("I32", 1)}


@pytest.mark.parametrize("block", [2, 64, 1 << 20])
@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
def test_any_cut_into_rows_blocks_and_threads_gives_the_same(model, monkeypatch, block, n_parts):
    monkeypatch.setattr(derive, "BLOCK_BYTES", block)
    rows = derive.matrices(survey(model))
    parts = [
        derive.derived_shares(rows, 1069, part=i, n_parts=n_parts, threads=1 + i % 3)
        for i in range(n_parts)
    ]
    found = {name: combine(p[name] for p in parts) for name in parts[0]}
    assert found == expected()


def test_a_row_longer_than_a_block_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(derive, "BLOCK_BYTES", 64)
    monkeypatch.setattr("spimpi.manifest.read.BLOCK_BYTES", 64)
    path = write_file(tmp_path / "x.safetensors", {"d.F32": MATRICES["d.F32"]})
    assert words(make_manifest(path, derived=True).derived.tensors) == oracle(
        "d.F32", *MATRICES["d.F32"]
    )


@pytest.mark.parametrize("name", MATRICES)
def test_one_other_bit_gives_other_words(tmp_path, name):
    """The sign of the largest element, which leaves the exponents as they are."""
    stored, shape, data = MATRICES[name]
    x = np.frombuffer(data, DTYPES[stored]).copy()
    at = int(np.argmax(np.abs(x.astype(float))))
    x[at] = -x[at]
    path = write_file(tmp_path / "x.safetensors", {name: (stored, shape, x.tobytes())})
    found = words(make_manifest(path, derived=True).derived.tensors)
    before = oracle(name, *MATRICES[name])
    differing = [n for n in found if found[n] != before[n]]
    assert differing == [f"{name} exact-1 integers"]


def test_the_file_is_read_as_it_was_written(model, tmp_path):
    made = make_manifest(model, derived=True)
    write_manifest(tmp_path / "m.json", made)
    assert read_manifest(tmp_path / "m.json") == made
    text = (tmp_path / "m.json").read_text()
    assert len(text.splitlines()) == len(made.tensors) + len(made.derived.tensors) + 13
    assert parse(json.dumps(json.loads(text), indent=3)) == made
    # what checks files takes no notice of it
    assert check_files(made, model).exit_status == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["tensors"].popitem(), "damaged"),
        (lambda d: d.update(arithmetic="exact-2"), "damaged"),
    ],
)
def test_the_checksum_covers_derived_tensors(model, change, words):
    values = json.loads(make_manifest(model, derived=True).dumps())
    change(values["derived"])
    with pytest.raises(UsageError, match=words):
        parse(json.dumps(values))


@pytest.mark.parametrize("derived", [[], {}, {"arithmetic": 1, "tensors": {}},
                                     {"arithmetic": "exact-1"},
                                     {"arithmetic": "exact-1", "tensors": {"w": ["F32", [1]]}}])  # fmt: skip
def test_what_is_no_list_of_derived_tensors_is_refused(model, derived):
    from spimpi.manifest.format import _checksum

    values = json.loads(make_manifest(model).dumps()) | {"derived": derived}
    del values["checksum"]
    values["checksum"] = _checksum(values)
    with pytest.raises(UsageError, match="in derived|tensor w: expected"):
        parse(json.dumps(values))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_that_is_not_finite_is_named(tmp_path, value, threads):
    x = np.ones((9, 4), np.float32)
    x[6, 2] = value
    path = write_file(tmp_path / "x.safetensors", {"w": ("F32", x.shape, x.tobytes())})
    assert make_manifest(path)
    with pytest.raises(UsageError, match=r"row 6 of tensor w holds NaN or Inf"):
        make_manifest(path, derived=True, threads=threads)


def test_a_checkpoint_without_matrices_has_nothing_to_derive(tmp_path):
    path = write_file(tmp_path / "x.safetensors", OTHERS)
    with pytest.raises(UsageError, match="nothing to derive .*expected tensors of two axes"):
        make_manifest(path, derived=True)
