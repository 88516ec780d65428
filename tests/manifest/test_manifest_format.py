"""The manifest file: what is written is read again, and no changed character goes unseen."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spimpi.errors import UsageError
from spimpi.manifest import Manifest, TensorFacts, read_manifest, write_manifest
from spimpi.manifest.dtypes import STORED_TYPES
from spimpi.manifest.format import parse

SAMPLE = Manifest(
    {
        "model.embed.weight": TensorFacts("BF16", (128, 64), 0x0123456789ABCDEF),
        "scale": TensorFacts("F32", (), 7),
        'odd "name" é\n': TensorFacts("C64", (3, 0), 0),
    },
    seed=5,
)

FACTS = st.builds(
    TensorFacts, st.sampled_from(sorted(STORED_TYPES)),
    st.lists(st.integers(0, 1 << 40), max_size=4).map(tuple), st.integers(0, (1 << 64) - 1),
)  # fmt: skip


@settings(deadline=None)
@given(st.dictionaries(st.text(), FACTS, max_size=6), st.integers(0, (1 << 64) - 1))
def test_what_is_written_is_read_again(tensors, seed):
    manifest = Manifest(tensors, seed)
    read = parse(manifest.dumps())
    assert read == manifest and list(read.tensors) == list(tensors)
    assert read.checksum == manifest.checksum


def test_the_text_is_as_documented():
    text = SAMPLE.dumps()
    values = json.loads(text)
    assert list(values) == ["spimpi_manifest", "fingerprint", "seed", "tensors", "checksum"]
    assert values["spimpi_manifest"] == values["fingerprint"] == 1
    assert values["tensors"]["model.embed.weight"] == ["BF16", [128, 64], "0123456789abcdef"]
    assert len(text.splitlines()) == len(SAMPLE.tensors) + 8


def test_the_checksum_is_the_documented_one():
    import hashlib

    values = json.loads(SAMPLE.dumps())
    checksum = values.pop("checksum")
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == checksum


def test_reformatting_keeps_the_checksum():
    values = json.loads(SAMPLE.dumps())
    shuffled = dict(sorted(values.items(), reverse=True))
    assert parse(json.dumps(shuffled, indent=3, ensure_ascii=False)) == SAMPLE


def test_a_field_of_a_later_writer_is_read_over_but_counts_in_the_checksum():
    from spimpi.manifest.format import _checksum

    values = json.loads(SAMPLE.dumps())
    del values["checksum"]
    values["note"] = "made by a later spimpi"
    values["checksum"] = _checksum({k: v for k, v in values.items()})
    assert parse(json.dumps(values)) == SAMPLE
    values["note"] += "!"
    with pytest.raises(UsageError, match="damaged"):
        parse(json.dumps(values))


def test_every_changed_character_is_seen():
    """Any one character replaced: the text is refused, or means the same (white space)."""
    text = SAMPLE.dumps()
    for i, character in enumerate(text):
        for other in "0f ":
            if other == character:
                continue
            changed = text[:i] + other + text[i + 1 :]
            try:
                assert parse(changed) == SAMPLE, (i, character, other)
            except UsageError:
                continue
            assert {character, other} <= set(" \n"), (i, character, other)


def test_every_flipped_hex_digit_is_seen():
    text = SAMPLE.dumps()
    for i in range(text.index("0123456789abcdef"), text.index("0123456789abcdef") + 16):
        digit = f"{int(text[i], 16) ^ 1:x}"
        with pytest.raises(UsageError, match=r"damaged.*copy it again"):
            parse(text[:i] + digit + text[i + 1 :])


def test_every_shorter_text_is_refused():
    text = SAMPLE.dumps()
    for n in range(len(text.rstrip())):
        with pytest.raises(UsageError):
            parse(text[:n])


def _rewritten(**changes):
    from spimpi.manifest.format import _checksum

    values = json.loads(SAMPLE.dumps())
    del values["checksum"]
    values |= changes
    return json.dumps(values | {"checksum": _checksum(values)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a manifest"),
        ("[1]", "not a manifest"),
        ("{}", "not a manifest"),
        (b"\xff\xfe", "not a manifest"),
        ("[" * 100000, "not a manifest"),
        ('{"spimpi_manifest": 1, "spimpi_manifest": 1}', "twice"),
        (_rewritten(spimpi_manifest=2), "version 2.*update spimpi"),
        (_rewritten(spimpi_manifest="1"), "version from 1 on"),
        (_rewritten(spimpi_manifest=True), "version from 1 on"),
        (_rewritten(fingerprint=2), "fingerprints of version 2"),
        (_rewritten(seed=-1), "seed of 64 bits"),
        (_rewritten(seed=1 << 64), "seed of 64 bits"),
        (_rewritten(tensors=[]), "object of tensors"),
        (_rewritten(tensors={"w": ["F32", [2], "12"]}), "tensor w.*16 hex digits"),
        (_rewritten(tensors={"w": ["F32", [-2], "0" * 16]}), "tensor w"),
        (_rewritten(tensors={"w": ["F32", [True], "0" * 16]}), "tensor w"),
        (_rewritten(tensors={"w": ["F4", [2], "0" * 16]}), "tensor w.*F4"),
        (_rewritten(tensors={"w": {"dtype": "F32"}}), "tensor w"),
        (_rewritten(tensors={"\ud800": ["F32", [2], "0" * 16]}), "not valid Unicode"),
        (SAMPLE.dumps().replace('"checksum"', '"checksums"'), "damaged"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"spimpi_manifest": ' + "9" * 5000 + "}", "not a manifest"),
        (_rewritten(spimpi_manifest=10**4000), "version"),
        (_rewritten(seed=10**4000), "seed of 64 bits"),
        (_rewritten(seed=1069.0), "seed of 64 bits"),
        (_rewritten(fingerprint=[1] * 5000), "fingerprints of version"),
        (_rewritten(tensors={"w": ["F32", [10**4000], "0" * 16]}), "tensor w"),
        (_rewritten(tensors={"w": ["F32", [float("inf")], "0" * 16]}), "tensor w"),
        (_rewritten(tensors={"w" * 5000: ["F32", "x" * 5000, "0" * 16]}), "tensor w"),
        (_rewritten(tensors={"w": ["x" * 5000, [2], "0" * 16]}), "no fingerprint for dtype"),
        (_rewritten(checksum=["x" * 5000]), "damaged"),
    ],
)  # fmt: skip
def test_what_is_no_manifest_is_refused(text, words):
    with pytest.raises(UsageError, match=f"(?s){words}") as caught:
        parse(text)
    assert len(str(caught.value)) <= 500 and "\n" not in str(caught.value)


def test_a_name_twice_among_many_is_found_in_a_moment():
    """The time grew with the square: these would have taken hours."""
    names = [f"t{i}" for i in range(300_000)] + ["t299999"]
    tensors = ",".join(f'"{name}":["F32",[1],"{"0" * 16}"]' for name in names)
    with pytest.raises(UsageError, match="'t299999' twice"):
        parse('{"spimpi_manifest": 1, "tensors": {' + tensors + "}}")


def test_special_files_and_impossible_names_are_no_manifests(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, "a" * 5000, "a\0b", tmp_path / "none"):
        with pytest.raises(UsageError, match="cannot be read") as caught:
            read_manifest(path)
        assert len(str(caught.value)) <= 500


def test_a_file_is_written_whole_and_never_replaced_unasked(tmp_path):
    path = tmp_path / "model.spi.json"
    write_manifest(path, SAMPLE)
    assert read_manifest(path) == SAMPLE
    other = Manifest({"w": TensorFacts("F32", (2,), 3)})
    with pytest.raises(UsageError, match=r"model\.spi\.json exists.*--overwrite"):
        write_manifest(path, other)
    assert read_manifest(path) == SAMPLE
    write_manifest(path, other, overwrite=True)
    assert read_manifest(path) == other
    assert [p.name for p in tmp_path.iterdir()] == ["model.spi.json"]


def test_a_file_that_came_in_the_meantime_is_not_replaced(tmp_path, monkeypatch):
    from spimpi import whole_file

    path = tmp_path / "model.spi.json"
    monkeypatch.setattr(whole_file, "check_can_write", lambda *_: path.write_text("another's"))
    with pytest.raises(UsageError, match="exists"):
        write_manifest(path, SAMPLE)
    assert path.read_text() == "another's"
    assert [p.name for p in tmp_path.iterdir()] == ["model.spi.json"]


@pytest.mark.parametrize("output", ["missing/model.spi.json", ".", "a-file/model.spi.json"])
def test_what_cannot_be_written_is_refused(tmp_path, output):
    (tmp_path / "a-file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        write_manifest(tmp_path / output, SAMPLE)


def test_no_manifest_there_is_said(tmp_path):
    with pytest.raises(UsageError, match=r"nosuch\.json cannot be read: No such file"):
        read_manifest(tmp_path / "nosuch.json")
