"""Prompts as token ids: built in, from text, from ids; and back to text."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spimpi.errors import MissingDependency, UsageError
from spimpi.inference.config import ModelConfig

TOKENIZER_FILE = "tokenizer.json"
BYTE_VOCABULARY = 256

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
    where neither is the case, where a prompt is empty, and for ids outside the vocabulary;
    MissingDependency without the package.
    """
    for index, text in enumerate(texts):
        if not text:
            msg = f"prompt {index} is empty: a prompt needs at least one token"
            raise UsageError(msg)
    tokenizer = _tokenizer(directory)
    if tokenizer is not None:
        ids = [tokenizer.encode(text).ids for text in texts]
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
            msg = f"prompt ids must be numbers separated by commas, found {field!r} in {text!r}"
            raise UsageError(msg)
    return _checked([int(field) for field in fields], vocab_size)


def decode(ids, config: ModelConfig, directory=None) -> str | None:
    """The text of ids, or None where the model has no text for them (no tokenizer, no bytes)."""
    tokenizer = _tokenizer(directory)
    ids = [int(token) for token in ids]
    if any(not 0 <= token < config.vocab_size for token in ids):
        return None  # of a corrupted run
    if tokenizer is not None:
        return tokenizer.decode(ids)
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


def _tokenizer(directory):
    """The tokenizer of a model directory, None where it has none."""
    path = None if directory is None else Path(directory) / TOKENIZER_FILE
    if path is None or not path.exists():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        msg = (
            f"{path} needs the tokenizers package: pip install tokenizers, or give --prompt-ids "
            "in place of text"
        )
        raise MissingDependency(msg) from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        msg = f"{path} cannot be read by the tokenizers package: {error}"
        raise UsageError(msg) from None
