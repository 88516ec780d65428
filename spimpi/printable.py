"""Text of files and programs, made fit for a terminal: nothing of it can steer one."""

import unicodedata

MOST = 500  # characters of one message
CUT = " … "
# Cc: control characters, ESC among them. Cf: what hides, or turns the direction of reading.
# Cs: halves of surrogate pairs, which cannot be printed. Zl, Zp: line separators of Unicode.
UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text, keep: str = "") -> str:
    r"""``text`` with what could steer a terminal as Python writes it: ``\x1b``, ``\u202e``.

    ``keep``: characters that stay as they are, "\n" for text of several lines.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _steers(c) else _escaped(c) for c in text)


def one_line(text, most: int = MOST) -> str:
    """``text`` on one line, printable, its middle left out where it is longer than ``most``."""
    if isinstance(text, KeyError) and " " in str(text.args):  # h5py's: Python would quote a sentence
        text = " ".join(map(str, text.args))
    line = printable(" ".join(str(text).split()))
    if len(line) <= most:
        return line
    head = (most - len(CUT)) * 2 // 3
    return line[:head] + CUT + line[head + len(CUT) - most :]


def _steers(character: str) -> bool:
    return unicodedata.category(character) in UNPRINTABLE


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
