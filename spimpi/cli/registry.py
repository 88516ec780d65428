"""How subcommands are registered: a decorator that names the command and its arguments."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    name: str
    help: str
    add_arguments: Callable
    run: Callable


COMMANDS: dict[str, Command] = {}


def subcommand(name: str, help: str, add_arguments: Callable):
    """Register ``run(args) -> exit status`` as ``spimpi NAME``.

    The modules that hold commands import nothing heavy at their top: a trace is read on login
    nodes that have no MPI, and ``--help`` should answer at once.
    """

    def register(run):
        COMMANDS[name] = Command(name, help, add_arguments, run)
        return run

    return register
