"""Text of files and programs on its way to a terminal."""

import pytest

from spimpi.printable import MOST, one_line, printable


@pytest.mark.parametrize(
    "steering, shown",
    [
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b31m", "\\x9b31m"),  # C1: the same as ESC [
        ("a\nb\rc", "a\\nb\\rc"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\u200bhidden", "\\u200bhidden"),
        ("\udc80", "\\udc80"),
        ("\x7f\x00", "\\x7f\\x00"),
    ],
)
def test_what_could_steer_a_terminal_is_written_out(steering, shown):
    assert printable(steering) == shown


def test_other_text_stays_as_it_is():
    assert printable("Modell „größer“ 模型 🙂 −1.5") == "Modell „größer“ 模型 🙂 −1.5"
    assert printable("two\nlines\x1b", keep="\n") == "two\nlines\\x1b"
    assert printable(KeyError("\x1b")) == repr("\x1b")


def test_a_message_is_one_line_of_bounded_length():
    assert one_line("two\n  lines") == "two lines"
    line = one_line("begin" + "x" * 10_000 + "end")
    assert len(line) == MOST and line.startswith("begin") and line.endswith("end")


def test_a_sentence_that_is_a_keys_error_is_not_quoted():
    assert one_line(KeyError("Unable to open object (no 'x')")) == "Unable to open object (no 'x')"
    assert one_line(KeyError("rank")) == "'rank'"
