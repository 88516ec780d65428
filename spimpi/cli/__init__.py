"""The command line: ``spimpi COMMAND …``; one file a subcommand."""

import argparse
import os
import re
import sys
import traceback
from array import array

from spimpi import __version__
from spimpi.cli.printable_errors import printable_errors
from spimpi.cli.registry import COMMANDS
from spimpi.cli.streams import never_raise, status_of_output
from spimpi.errors import SpimpiError
from spimpi.launch import (
    let_rank_0_speak, require_numbers, set_thread_limits, speaks, wait_asleep,
)  # fmt: skip
from spimpi.optional import optional_packages
from spimpi.printable import one_line


class _Parser(argparse.ArgumentParser):
    """Usage errors are said once, by rank 0, in one line, and end every rank with status 2."""

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; what a command does not know it says itself, not ``spimpi`` for it."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message):
        self.exit(2, one_line(f"{self.prog}: error: {message} (see {self.prog} --help)") + "\n")

    def exit(self, status=0, message=None):
        if message and speaks():
            sys.stderr.write(message)
        sys.exit(status)

    def print_help(self, file=None):
        if speaks():
            super().print_help(file)


def build_parser() -> argparse.ArgumentParser:
    from spimpi.cli import bench, completion, doctor, golden, manifest, trace, verify  # noqa: F401  they register

    parser = _Parser(
        prog="spimpi",
        description="Verify distributed transformer inference in place, over MPI.",
        epilog="Exit status, on every rank: 0 verified; 1 corruption found; 2 wrong usage or "
        "environment; 3 incomplete; 4 internal error.",
    )
    parser.add_argument("--version", action="version", version=f"spimpi {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv=None) -> int:
    """Run one subcommand; returns its exit status."""
    set_thread_limits()  # before anything imports numpy, which reads them then
    _let_all_text_out()
    _forget_odd_sizes()
    with printable_errors():
        args = build_parser().parse_args(argv)

        def run():
            require_numbers()
            return args.run(args)

        return status_of(run)


def _let_all_text_out() -> None:
    r"""Characters that the encoding of an output lacks are written as Python writes them: \xe9."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _forget_odd_sizes() -> None:
    """Of a terminal: Rich fails at some digits, and prints nothing in no column."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{0,8}", os.environ.get(name, "1")):
            del os.environ[name]


def status_of(command) -> int:
    """What ``command()`` returns, or the exit status of its error, which is said."""
    try:
        with optional_packages():
            return command()
    except SpimpiError as error:
        if speaks():
            print(one_line(f"spimpi: {error}"), file=sys.stderr)
        return error.exit_status
    except Exception:  # Python's own status for it is 1, which says that corruption was found
        traceback.print_exc()
        _end_job()
        return SpimpiError.exit_status


def entry() -> None:
    """What the ``spimpi`` command runs: ``main``, then the end of MPI and of the process.

    After MPI_Finalize there is nothing left to do, and 64 interpreters that take themselves apart
    on two cores take as long over it as over the run.
    """
    never_raise()
    try:
        status = main()
    except SystemExit as left:  # argparse's way to say a usage error
        status = left.code
    status = status_of_output(status)
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is None or not MPI.Is_initialized() or MPI.Is_finalized():
        if status:
            let_rank_0_speak()
        sys.exit(status)
    if MPI.COMM_WORLD.size > 1:
        own, agreed = array("i", [status]), array("i", [0])
        # Rank 0 alone knows that its output was lost. A barrier too.
        wait_asleep(MPI.COMM_WORLD.Iallreduce(own, agreed, MPI.MAX))
        (status,) = agreed
    MPI.Finalize()
    os._exit(status)


def _end_job() -> None:
    """End the other ranks too, which may wait for this one: by MPI_Abort."""
    MPI = sys.modules.get("mpi4py.MPI")
    if MPI is not None and MPI.Is_initialized() and not MPI.Is_finalized():
        if MPI.COMM_WORLD.size > 1:
            MPI.COMM_WORLD.Abort(SpimpiError.exit_status)
