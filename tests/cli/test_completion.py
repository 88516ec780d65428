"""Shell completions are made of the parser, and each shell completes with them."""

import shutil
import subprocess

import pytest

from spimpi.cli import build_parser, main
from spimpi.cli.completion import SHELLS, commands_of

BASH = """source "$1"; shift
COMP_WORDS=(spimpi "$@"); COMP_CWORD=$#; _spimpi; printf '%s\\n' "${COMPREPLY[@]}"
"""
# _describe and _files are zsh's own: what they are given is what is offered.
ZSH = """autoload -Uz compinit; compinit -D -u; source "$1"; shift
words=(spimpi "$@"); CURRENT=${#words}
_describe() { local value; for value in "${(@P)4}"; do
    value=${value%%:*}; [[ $value == ${words[CURRENT]}* ]] && print -r -- $value; done }
_files() { print -l -- ${words[CURRENT]}*(N) }
_spimpi; true
"""
FISH = """source $argv[1]; complete -C (string join -- ' ' spimpi $argv[2..-1]) | cut -f 1"""
CASES = {
    "a command": (["tr"], ["trace"]),
    "a command of a command": (["trace", "s"], ["show"]),
    "an option": (["verify", "--exo"], ["--exo-rule"]),
    "an option of a command of a command": (["trace", "export", "--over"], ["--overwrite"]),
    "a value": (["verify", "--trace-driver", "ga"], ["gather"]),
    "a name": (["verify", "--config", "olmo-3"], ["olmo-3-7b"]),
    "a word of a list": (["completion", "z"], ["zsh"]),
    "a file": (["trace", "show", "a-tr"], ["a-trace.h5"]),
    "a file of an option": (["verify", "--golden", "a-tr"], ["a-trace.h5"]),
    "after other options": (["verify", "--json", "--tokens", "2", "--no-t"], ["--no-trace"]),
}


@pytest.fixture
def complete(tmp_path, capsys, monkeypatch):
    """``complete(shell, words)``: what the shell offers for the last of the words."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-trace.h5").touch()

    def run(shell, words):
        if not shutil.which(shell):
            pytest.skip(f"needs {shell}")
        assert main(["completion", shell]) == 0
        script = tmp_path / f"script.{shell}"
        script.write_text(capsys.readouterr().out)
        if shell != "fish":
            subprocess.run([shell, "-n", script], check=True)
        command = {
            "bash": ["bash", "--norc", "-c", BASH, "bash", script, *words],
            "zsh": ["zsh", "-f", "-c", ZSH, "zsh", script, *words],
            "fish": ["fish", "--no-config", "-c", FISH, script, *words],
        }[shell]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    return run


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(complete, shell, case):
    words, expected = CASES[case]
    assert complete(shell, words) == expected


def test_every_command_and_option_of_the_parser_is_known():
    commands = {command.name: command for command in commands_of(build_parser())}
    assert {"spimpi verify", "spimpi trace diff", "spimpi manifest check"} <= set(commands)
    verify = {name for option in commands["spimpi verify"].options for name in option.names}
    assert {"--topology", "--inject", "--help-faults", "--json", "-h"} <= verify
    assert commands["spimpi"].commands["doctor"].startswith("what this environment can do")


def test_the_bash_script_is_clean(tmp_path, capsys):
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "spimpi.bash").write_text(capsys.readouterr().out)
    done = subprocess.run(["shellcheck", "-s", "bash", tmp_path / "spimpi.bash"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
