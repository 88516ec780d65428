"""What --help shows, and what a wrong command line is told."""

import pytest

from spimpi.cli import main
from spimpi.faults.places import PLACES
from spimpi.faults.spec import KINDS


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    return left.value.code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_the_help_of_verify_fits_two_screens(capsys):
    status, out, err = said(capsys, "verify", "--help")
    lines = out.splitlines()
    assert (status, err) == (0, "") and len(lines) <= 48
    assert max(map(len, lines)) <= 80
    assert "--help-faults" in out


def test_faults_have_a_help_of_their_own(capsys):
    status, out, err = said(capsys, "verify", "--help-faults")
    words = out.split()
    assert (status, err) == (0, "")
    assert not set(KINDS) - set(words) and not set(PLACES) - set(words)
    for place in ("rank=", "layer=", "tensor=", "step=", "element=", "bit="):
        assert place in out


WRONG = (
    ["verify", "--tokens", "many"], ["verify", "--no-such-option"], ["verify", "--exo-rule", "x" * 9000],
    ["verify", "--tokens", "9" * 5000], ["verify", "--exo-rule", "\x1b[2J\x9b"], ["trace", "show"], ["verfy"], [],
    ["verify", "--trace", "a", "--no-trace"], ["bench", "a\nb"],
)  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG, ids=range(len(WRONG)))
def test_a_wrong_command_line_is_told_in_one_line(capsys, arguments):
    status, out, err = said(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and len(err) <= 501 and err[:-1].isprintable()
    assert err.startswith("spimpi") and " error: " in err


def test_ranks_other_than_0_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    for arguments in (["verify", "--help"], ["verify", "--help-faults"], ["verify", "--bogus"]):
        assert said(capsys, *arguments)[1:] == ("", "")


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["verify", "--bogus"], "spimpi verify"), (["trace", "show", "a", "--bogus"], "spimpi trace show"),
        (["doctor", "a"], "spimpi doctor"), (["--bogus", "doctor"], "spimpi"),
    ],
)  # fmt: skip
def test_who_does_not_know_an_argument_names_its_own_help(capsys, arguments, command):
    status, _, err = said(capsys, *arguments)
    assert status == 2 and err.startswith(f"{command}: error: unrecognized arguments: ")
    assert err.endswith(f"(see {command} --help)\n")


def test_the_published_models_that_are_offered_are_all():
    from spimpi.cli import verify
    from spimpi.inference import published

    assert set(verify.PUBLISHED) == set(published.PUBLISHED)
