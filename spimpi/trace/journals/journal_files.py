"""Where the journals of a trace are, who holds them, and how they go."""

import errno
import fcntl
import os
import re
import stat
import time
from pathlib import Path

from spimpi.errors import UsageError
from spimpi.regular_file import open_regular
from spimpi.trace.journals.growing import table_path
from spimpi.trace.journals.node_file import EXTENT, Stream, create, node_file, streams
from spimpi.trace.journals.sketch_file import sketch_path
from spimpi.whole_file import no_ordinary_file

RANKS_OWN, NODES = "rank-*.journal", "node-*.journal"
# All that a run makes in the folder of its journals.
OURS = re.compile(r"(rank|node)-\d{5,10}\.(journal|tensors|sketches)|sealing-[0-9a-f]{16}")
REPLACE = "with `spimpi verify` use --overwrite, with a DistributedContext overwrite=True"


def journal_folder(path, local=None) -> Path:
    """Where the journals of the trace ``path`` are while the run goes on; ``local``: in there."""
    folder = Path(f"{path}.journal")
    return folder if local is None else Path(local) / folder.name


def journal_path(folder, rank: int) -> Path:
    """The journal of a rank that has files of its own."""
    return Path(folder) / f"rank-{rank:05d}.journal"


def make_folder(folder: Path) -> None:
    """The folder of this run's journals, and the one that it is in, which other ranks may have made.
    OSError; FileExistsError where a link or a file stands there, or another user's folder."""
    folder.parent.mkdir(exist_ok=True)  # --journal DIR; the path to it must be there
    folder.mkdir(exist_ok=True)
    facts, own = os.lstat(folder), os.geteuid()
    # On a network's disk root's folder may be nobody's.
    if not stat.S_ISDIR(facts.st_mode) or own not in (0, facts.st_uid):
        raise FileExistsError(errno.EEXIST, "a link or another user's folder is there", str(folder))


def journals_in(folder: Path) -> tuple[list[Path | Stream], list[str], list[str]]:
    """All ranks' journals, in order; what is missing and what is damaged of nodes' files."""
    found: list[Path | Stream] = []
    missing, damage = [], []
    for file in (*folder.glob(RANKS_OWN), *folder.glob(NODES)):
        if no_ordinary_file(file):
            damage.append(f"{file.name}: it is {no_ordinary_file(file)}, and was not read")
        elif file.match(RANKS_OWN):
            found.append(file)
        else:
            there, problem = streams(file)
            found += there
            if problem and file.stat().st_size < EXTENT:
                missing.append(f"{file.name}: cut short, nothing was flushed")
            elif problem:
                damage.append(problem)
    return sorted(found, key=lambda journal: journal.name), missing, damage


def files_of(journals) -> list[Path]:
    """The files that hold these journals."""
    return list(dict.fromkeys(j.file if isinstance(j, Stream) else j for j in journals))


def lock(file: Path, shared: bool = False):
    """The lock of a journal's file, held until what this returns is closed; None: it is taken.

    A run holds it while it writes its journal, and whoever seals; the ranks of a node ``shared``
    where they share a file. On a file system without locks nobody has one.
    """
    held = open_regular(file, follow=False, write=True)  # NFS wants to be able to write
    try:
        fcntl.flock(held, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        return None
    except OSError:
        pass
    return held


def in_use(file: Path) -> bool:
    """Whether a process holds a journal's file open for writing (or seals it)."""
    kind = fcntl.LOCK_SH if file.match(RANKS_OWN) else fcntl.LOCK_EX
    try:
        opened = open_regular(file, follow=False)
    except OSError:  # a link, a FIFO: nobody's journal
        return False
    with opened:
        for wait in (0.01, 0.02, 0.04, 0):
            try:
                fcntl.flock(opened, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(wait)  # who else asks holds it for a moment
            except OSError:  # no locks on this file system
                return False
            else:
                return False
    return True


def clear_own(folder, rank: int) -> None:
    """Remove this rank's files of an earlier run, which rank 0 can't see on another node."""
    for file in (journal_path(folder, rank), Path(folder) / f"node-{rank:05d}.journal"):
        if not file.exists():
            continue
        if (held := lock(file)) is None:
            msg = f"the journal {file} is being written by a running job; choose another name"
            raise UsageError(msg)
        held.close()
        remove_file(file)


def remove_journal(journal: Path | Stream) -> None:
    """Remove a rank's journal after sealing. A file of a node goes with that of its first rank."""
    if not isinstance(journal, Stream):
        remove_file(journal)
    elif journal.rank == min(journal.ranks):
        remove_file(journal.file)


def remove_file(file: Path) -> None:
    sketch_path(file).unlink(missing_ok=True)
    file.unlink()
    table_path(file).unlink(missing_ok=True)


def own_journal(comm, together, folder, renew: bool = False) -> Path | Stream:
    """Where this rank is to write its journal; a node's file is made by its first rank.

    Collective; ``together`` is a context in which an error of one rank becomes one of all.
    ``renew``: files of an earlier run are removed. UsageError where one is there.
    """
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    ranks = node.allgather(comm.rank)
    node.Free()
    folder = Path(folder)
    file = node_file(folder, ranks)
    with together():
        if renew:
            clear_own(folder, comm.rank)
        if file is not None and comm.rank == min(ranks):
            try:
                make_folder(folder)
                create(file, ranks)
            except FileExistsError as error:
                raise UsageError(already_there(error.filename or file)) from None
            except OSError as error:
                msg = f"cannot create the trace's journals {file}: {error.strerror}"
                raise UsageError(msg) from None
    return Stream(file, tuple(ranks), comm.rank) if file else journal_path(folder, comm.rank)


def already_there(file) -> str:
    return f"a journal of an earlier run, or another's, is there: {file}; remove it ({REPLACE})"
