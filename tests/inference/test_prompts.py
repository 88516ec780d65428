import json
import os
import sys

import numpy as np
import pytest
from reference_models import greedy, tiny_config

from spimpi.errors import MissingDependency, UsageError
from spimpi.inference.config import EMBEDDED_MODEL, load_config, published
from spimpi.inference.prompts import Prompts, built_in, check_length, decode, encode, parse_ids
from spimpi.verification.job import Request


@pytest.fixture
def words(tmp_path):
    """A directory with a tokenizer of three words that puts an id of its own in front."""
    tokenizers = pytest.importorskip("tokenizers", reason="the package that reads tokenizer.json")
    vocabulary = {"<start>": 0, "the": 1, "file": 2, "?": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_built_in_prompts_are_short_and_of_different_lengths():
    texts = built_in(8)
    assert len(set(map(len, texts))) == 8
    assert all(1 <= len(text.encode()) <= 24 for text in built_in(200))


def test_built_in_prompts_begin_with_those_of_the_embedded_model():
    known = json.loads((EMBEDDED_MODEL / "greedy.json").read_text())
    assert built_in(3) == list(known)


def test_more_prompts_begin_with_fewer_and_never_repeat():
    many = built_in(200)
    assert len(many) == len(set(many)) == 200
    assert all(built_in(n) == many[:n] for n in (0, 1, 3, 8, 9, 64))


def test_the_embedded_model_takes_bytes():
    config = load_config(EMBEDDED_MODEL)
    prompts = encode(["The ", "é"], config, EMBEDDED_MODEL)
    assert [ids.tolist() for ids in prompts.ids] == [[84, 104, 101, 32], [0xC3, 0xA9]]
    assert all(ids.dtype == np.int64 for ids in prompts.ids)
    assert prompts.texts == ["The ", "é"]


def test_seeded_models_take_bytes_too():
    prompts = encode(["The "], published("llama-3.2-1b"))
    assert prompts.ids[0].tolist() == [84, 104, 101, 32]


def test_a_tokenizer_makes_the_ids_where_there_is_one(words):
    config = tiny_config(vocab_size=256)
    assert encode(["the file the"], config, words).ids[0].tolist() == [0, 1, 2, 1]
    assert decode([[1, 2], [300]], config, words) == ["the file", None]


def test_an_id_of_the_tokenizer_outside_the_vocabulary_is_refused(words):
    with pytest.raises(UsageError, match="prompt id 2 is not in the vocabulary: expected 0 to 1"):
        encode(["the file"], tiny_config(vocab_size=2), words)


def test_a_broken_tokenizer_is_named(tmp_path):
    pytest.importorskip("tokenizers", reason="the package that reads tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be read"):
        encode(["the"], tiny_config(), tmp_path)


def test_without_the_package_the_message_says_what_to_install(words, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    with pytest.raises(MissingDependency, match="pip install tokenizers") as caught:
        encode(["the"], tiny_config(), words)
    assert caught.value.exit_status == 2


def test_text_without_a_tokenizer_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(UsageError, match="no tokenizer.json.*32000 ids.*--prompt-ids"):
        encode(["the"], tiny_config(vocab_size=32000), tmp_path)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UsageError, match="prompt 1 is empty"):
        encode(["a", ""], tiny_config(vocab_size=256))
    with pytest.raises(UsageError, match="empty"):
        parse_ids(" ", 256)


def test_ids_are_parsed():
    found = parse_ids("84, 104,101", 256)
    assert found.tolist() == [84, 104, 101] and found.dtype == np.int64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("84,x", "found 'x'"),
        ("84,,3", "found ''"),
        ("8.5", "found '8.5'"),
        ("84,256", "256 is not in the vocabulary: expected 0 to 255"),
        ("-1", "-1 is not in the vocabulary"),
    ],
)
def test_wrong_ids_are_named(text, message):
    with pytest.raises(UsageError, match=message):
        parse_ids(text, 256)


def test_bytes_decode_to_text_whatever_they_are(tmp_path):
    config = load_config(EMBEDDED_MODEL)
    found = decode([[84, 104, 101], [84, 255]], config, EMBEDDED_MODEL)
    assert found == ["The", "T\ufffd"]


def test_ids_that_are_no_bytes_have_no_text(tmp_path):
    assert decode([[84, 300]], published("llama-3.2-1b")) == [None]
    assert decode([[84]], tiny_config(vocab_size=32000), tmp_path) == [None]


def test_prompts_that_do_not_fit_the_model_are_refused_with_the_numbers():
    config = tiny_config(max_position_embeddings=10)
    prompts = Prompts([np.arange(3), np.arange(6)])
    check_length(prompts, 4, config)
    with pytest.raises(UsageError, match="prompt 1 has 6 tokens, with 5 more.*11.*at most 10"):
        check_length(prompts, 5, config)


def test_transformers_continues_the_embedded_model_as_its_greedy_file_says():
    pytest.importorskip("torch", reason="torch is the reference")
    known = json.loads((EMBEDDED_MODEL / "greedy.json").read_text())
    text, continuation = next(iter(known.items()))
    assert greedy(EMBEDDED_MODEL, text.encode(), 8) == continuation[:8]


# bytes of a command line that are no text, files that are no tokenizers


def in_disguise(data: bytes) -> str:
    """A command line's bytes as Python hands them on where the locale is not UTF-8 (PEP 383)."""
    return data.decode("ascii", "surrogateescape")


def test_utf_8_is_utf_8_whatever_the_locale():
    config = load_config(EMBEDDED_MODEL)
    prompts = encode([in_disguise("é→".encode())], config, EMBEDDED_MODEL)
    assert prompts.ids[0].tolist() == list("é→".encode()) and prompts.texts == ["é→"]


@pytest.mark.parametrize("text", [in_disguise(b"caf\xe9"), "\ud800", in_disguise(b"\xff") * 5000])
def test_a_prompt_that_is_no_utf_8_is_refused(text):
    with pytest.raises(UsageError, match="prompt 1 is not UTF-8") as caught:
        encode(["good", text], load_config(EMBEDDED_MODEL), EMBEDDED_MODEL)
    assert len(str(caught.value)) <= 500


@pytest.mark.parametrize("ids", ["9" * 5000, "1,-" + "9" * 30, "1," + "x" * 5000, "²", "1,\x1b[31m"])
def test_impossible_ids_are_refused_in_one_line(ids):
    with pytest.raises(UsageError) as caught:
        parse_ids(ids, 256)
    assert len(str(caught.value)) <= 500 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("contents", [b"", b"[" * 100_000, b"\xff\xfe", b"{}", b"null", None])
def test_a_tokenizer_that_is_none_is_refused(tmp_path, contents):
    pytest.importorskip("tokenizers", reason="the package that reads tokenizer.json")
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path) if contents is None else path.write_bytes(contents)
    with pytest.raises(UsageError, match="tokenizer.json cannot be read") as caught:
        encode(["x"], load_config(EMBEDDED_MODEL), tmp_path)
    assert len(str(caught.value)) <= 500


def changed(words, **fields):
    path = words / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


PADDING = {
    "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
    "pad_token": "<start>",
}  # fmt: skip
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize(
    "fields", [{"padding": PADDING | {"strategy": {"Fixed": 1000}}}, {"truncation": TRUNCATION}]
)
def test_a_prompt_is_neither_padded_nor_cut(words, fields):
    changed(words, **fields)
    found = encode(["the file the"], tiny_config(vocab_size=256), words)
    assert found.ids[0].tolist() == [0, 1, 2, 1]


def test_a_tokenizer_that_asks_for_all_memory_is_refused_in_one_line(words, capfd):
    tenfold = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    changed(words, normalizer={"type": "Sequence", "normalizers": [tenfold] * 10})
    with pytest.raises(UsageError, match="text cannot be used with .*tokenizer.json: ") as caught:
        encode(["a" * 36], tiny_config(vocab_size=256), words)
    assert len(str(caught.value)) <= 500 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("field", ["prompts", "prompt_ids", "faults"])
@pytest.mark.parametrize(
    ("given", "found"),
    [("hello", "a str"), (b"1", "a bytes"), (None, "a NoneType"), ((1,), "an int in it"), (["a", None], "a NoneType in it")],
)  # fmt: skip
def test_what_a_request_repeats_is_a_tuple_of_texts(field, given, found):
    with pytest.raises(UsageError, match=f"{field} is a tuple of texts, found {found}$"):
        Request(**{field: given})
    assert getattr(Request(**{field: ["a"]}), field) == ["a"]
