"""The words of chosen tokens: one a step, from the choice to what is printed.

A step's word is the XOR of its tokens' shares, by prompt: words of some prompts' tokens combine by
XOR to those of all. Whoever holds tokens [prompts, steps] can so be asked whether they are those
that were chosen.
"""

import numpy as np

from spimpi.fingerprint.tag import CONTENT, Tag
from spimpi.inference.kernels import fingerprint_tokens


def token_keys(seed: int, n_prompts: int, n_steps: int) -> np.ndarray:
    """Stream keys of every step's tokens, uint64 [steps]; n_prompts: all of the job's."""
    tags = (Tag(seed, "tokens", -1, step) for step in range(n_steps))
    return np.array([tag.key(CONTENT, (n_prompts,), 8) for tag in tags], np.uint64)


def token_words(tokens, keys: np.ndarray, first: int = 0) -> np.ndarray:
    """Each step's share, uint64 [steps], of tokens [prompts, steps], the prompts first, first + 1…"""
    columns = np.array(np.asarray(tokens, np.int64).T, order="C")
    words = np.zeros(len(columns), np.uint64)
    for step, column in enumerate(columns):
        fingerprint_tokens(column, keys, step, first, words, step)
    return words


def folded(words: np.ndarray) -> np.uint64:
    """One word of all steps."""
    return np.bitwise_xor.reduce(words, initial=np.uint64(0))
