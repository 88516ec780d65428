"""Prompts as token ids: built in, from text, from ids; and back to text."""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spimpi.errors import MissingDependency, UsageError
from spimpi.in_child import in_child
from spimpi.inference.config import ModelConfig
from spimpi.printable import one_line
from spimpi.regular_file import read_at_most

TOKENIZER_FILE = "tokenizer.json"
BYTE_VOCABULARY = 256
LONGEST_NUMBER = 18  # digits
LONGEST_TOKENIZER = 1 << 28  # bytes
# What a tokenizer may take: a small file can ask for any work and memory, and Rust then aborts.
MEMORY = 1 << 29  # bytes, beside 32 times the file's and the texts'
SECONDS, SPEED = 10, 1 << 20  # of processor time; bytes a second beyond

# The first three are those of the embedded model's greedy.json.
_BUILT_IN = (
    "This License ",
    "The file ",
    "Return the ",
    "For example, if ",
    "If the ",
    "You may not use this ",
    "A list of ",
    "In the case of an error ",
)
_MORE = ("Section {} of the ", "See page {} for ", "Option {}: ", "Version {} is a ")


@dataclass(frozen=True)
class Prompts:
    """Token ids, int64 [length] a prompt; texts where the prompts were given as text."""

    ids: list[np.ndarray]
    texts: list[str] | None = None


def built_in(n: int) -> list[str]:
    """The first n built-in English prompts, of at most 24 bytes each; always the same."""
    more = (_MORE[i % len(_MORE)].format(i) for i in range(len(_BUILT_IN), n))
    return [*_BUILT_IN[:n], *more]


def encode(texts: list[str], config: ModelConfig, directory=None) -> Prompts:
    """The ids of the texts for a model directory, or for seeded weights (directory None).

    With a tokenizer.json the tokenizers package makes them, special tokens included. Seeded
    weights and models of 256 ids without a tokenizer take the UTF-8 bytes. Raises UsageError
    where neither is the case, where a prompt is empty or no UTF-8, and for ids outside the
    vocabulary; MissingDependency without the package.
    """
    texts = [_in_utf8(index, text) for index, text in enumerate(texts)]
    for index, text in enumerate(texts):
        if not text:
            msg = f"prompt {index} is empty: a prompt needs at least one token"
            raise UsageError(msg)
    path = _tokenizer_file(directory)
    if path is not None:
        size = sum(map(len, texts))
        ids = _tokenized(path, "text", lambda it: [it.encode(text).ids for text in texts], size)
    elif directory is None or config.vocab_size == BYTE_VOCABULARY:
        ids = [list(text.encode()) for text in texts]
    else:
        msg = (
            f"{directory} has no {TOKENIZER_FILE} and {config.name} has {config.vocab_size} ids, "
            f"not {BYTE_VOCABULARY} (bytes), so text cannot be turned into ids: give --prompt-ids"
        )
        raise UsageError(msg)
    return Prompts([_checked(one, config.vocab_size) for one in ids], list(texts))


def parse_ids(text: str, vocab_size: int) -> np.ndarray:
    """Ids, int64, from comma-separated decimal numbers such as "84,104,101"."""
    fields = [field.strip() for field in text.split(",")] if text.strip() else []
    for field in fields:
        if not (field.isascii() and field.removeprefix("-").isdigit()):
            msg = (
                f"prompt ids must be numbers separated by commas, found {one_line(repr(field), 60)} "
                f"in {one_line(repr(text), 100)}"
            )
            raise UsageError(msg)
        if len(field) > LONGEST_NUMBER:
            msg = (
                f"prompt id {one_line(field, 60)} is not in the vocabulary: expected 0 to "
                f"{vocab_size - 1}"
            )
            raise UsageError(msg)
    return _checked([int(field) for field in fields], vocab_size)


def decode(lists, config: ModelConfig, directory=None) -> list[str | None]:
    """The text of each list of ids, None where the model has none (no tokenizer, no bytes)."""
    lists = [[int(token) for token in ids] for ids in lists]
    path = _tokenizer_file(directory)

    def texts(text_of):  # ids outside the vocabulary are of a corrupted run
        sound = (all(0 <= token < config.vocab_size for token in ids) for ids in lists)
        return [text_of(ids) if fits else None for ids, fits in zip(lists, sound, strict=True)]

    if path is not None:
        return _tokenized(path, "ids", lambda it: texts(it.decode), sum(map(len, lists)))
    return texts(lambda ids: _from_bytes(ids, config, directory))


def _from_bytes(ids, config, directory) -> str | None:
    if any(token >= BYTE_VOCABULARY for token in ids):
        return None
    if directory is not None and config.vocab_size != BYTE_VOCABULARY:
        return None
    return bytes(ids).decode(errors="replace")


def check_length(prompts: Prompts, n_tokens: int, config: ModelConfig) -> None:
    """Raise UsageError unless every prompt and n_tokens generated ids fit the model."""
    for index, ids in enumerate(prompts.ids):
        if len(ids) + n_tokens > config.max_position_embeddings:
            msg = (
                f"prompt {index} has {len(ids)} tokens, with {n_tokens} more asked for that is "
                f"{len(ids) + n_tokens}: {config.name} takes at most "
                f"{config.max_position_embeddings} (max_position_embeddings)"
            )
            raise UsageError(msg)


def _checked(ids: list[int], vocab_size: int) -> np.ndarray:
    if not ids:
        msg = "the prompt is empty: a prompt needs at least one token"
        raise UsageError(msg)
    for token in ids:
        if not 0 <= token < vocab_size:
            msg = f"prompt id {token} is not in the vocabulary: expected 0 to {vocab_size - 1}"
            raise UsageError(msg)
    return np.array(ids, dtype=np.int64)


def _in_utf8(index: int, text: str) -> str:
    """The text of a prompt as it was typed.

    Where the locale is not UTF-8, Python hands on bytes of a command line in disguise (PEP 383).
    """
    try:
        return text.encode(errors="surrogateescape").decode()
    except UnicodeError:
        msg = (
            f"prompt {index} is not UTF-8: {one_line(repr(text), 100)}; give it in UTF-8, or its ids "
            "(--prompt-ids)"
        )
        raise UsageError(msg) from None


def _tokenizer_file(directory) -> Path | None:
    path = None if directory is None else Path(directory) / TOKENIZER_FILE
    return path if path is not None and path.exists() else None


def _tokenized(path: Path, what: str, use: Callable, size: int):
    """What ``use`` makes of ``what`` with a tokenizer, in a child. ``size``: its characters."""
    name = one_line(path, 250)
    try:
        import tokenizers  # noqa: F401  once, not in the child
    except ImportError:
        msg = (
            f"{name} needs the tokenizers package: pip install tokenizers, or give --prompt-ids "
            "in place of text"
        )
        raise MissingDependency(msg) from None

    def work():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads would each reserve memory
        tokenizer = _tokenizer(path, name)
        with _refused(f"{what} cannot be used with {name}"):
            return use(tokenizer)

    with _refused(f"{what} cannot be used with {name}"):
        size += path.stat().st_size
        return in_child(work, MEMORY + 32 * size, SECONDS + size // SPEED)


def _tokenizer(path: Path, name: str):
    from tokenizers import Tokenizer

    try:
        contents = read_at_most(path, LONGEST_TOKENIZER)
    except OSError as error:
        msg = f"{name} cannot be read: {error.strerror}"
        raise UsageError(msg) from None
    with _refused(f"{name} cannot be read by the tokenizers package"):
        tokenizer = Tokenizer.from_buffer(contents)
        # Of a batch that is to be of one length: a prompt is taken as it is.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


@contextmanager
def _refused(what: str):
    """What the tokenizers package raises, as UsageError: plain Exceptions, and panics of its Rust
    code, which are not even those."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UsageError):
        raise
    except BaseException as error:
        msg = f"{what}: {one_line(error, 150)}"
        raise UsageError(msg) from None
