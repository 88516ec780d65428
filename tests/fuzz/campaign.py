"""The fuzz campaign: hostile inputs for every file that spimpi reads, and for its command line.

    python tests/fuzz/campaign.py --n 5000            by hand; CI runs 300
    python tests/fuzz/campaign.py --replay 1069:17    one case again, its folder kept

README.md, beside this, says what is judged.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import checkpoint_kinds  # noqa: F401  they register
import option_kinds  # noqa: F401
import sound
import trace_kinds  # noqa: F401
from cases import KINDS, draw
from running import MEMORY, PATIENCE, SECONDS, Outside, judge, load, run

TELL = 500  # a worker says at every so many cases where it is


@dataclass(frozen=True)
class Failure:
    """A case that did not end as it should, with the fewest of its changes that do it."""

    case: str  # SEED:NUMBER
    kind: str
    wrong: tuple
    argv: list
    changes: list
    last: str


def attempt(case, changes, folder: Path, outside: Outside):
    """Make the inputs with these changes, run the command; (outcome, what is wrong)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    case.write(folder, changes)
    argv, environ = _command(case, changes)
    outcome = run(argv, folder, environ=environ)
    if outcome.status is None and outcome.processor < SECONDS / 2:
        outcome = run(argv, folder, seconds=PATIENCE * SECONDS, environ=environ)
    # Commands that take several traces have a line for each that cannot be read.
    lines = len(argv) - 2 if argv[:1] == ["trace"] else 1
    wrong = judge(outcome, case.may_find_corruption, max(1, lines))
    if touched := outside.touched():
        wrong.append(f"touched outside its folder: {touched[:3]}")
    return outcome, wrong


def _command(case, changes) -> tuple[list, dict]:
    """Arguments and environment; of cases whose changes are these themselves."""
    if case.kind == "environment":
        return list(case.argv[0]), {n: v.replace("\0", "") for n, v in changes}
    if case.argv and callable(case.argv[-1]):
        base, words = case.argv
        return [*base, *words(changes)], {}
    return list(case.argv), {}


def smallest(case, wrong, folder, outside):
    """One change that alone gives the same fault, else all of them."""
    if len(case.changes) > 1 and not any("hang" in one for one in wrong):
        for change in case.changes:
            _, found = attempt(case, (change,), folder, outside)
            if set(_kinds(wrong)) & set(_kinds(found)):
                return (change,)
    return case.changes


def _kinds(wrong) -> list[str]:
    return [one.split(":")[0] for one in wrong]


def one(seed: int, number: int, root: Path, worker: Path) -> Failure | None:
    """Case ``number`` of a campaign; None where nothing is wrong."""
    outside = Outside(worker, root / "sound", but="cases")
    folder = worker / "cases" / "case"
    case = draw(seed, number, root / "sound")
    outcome, wrong = attempt(case, case.changes, folder, outside)
    if not wrong:
        return None
    changes = smallest(case, wrong, folder, outside)
    argv, environ = _command(case, changes)
    said = [line for line in (outcome.err or outcome.out).splitlines() if line.strip()]
    said.sort(key=lambda line: bool(re.match(r"[\w.]+(Error|Warning|Exception)\b", line)))  # last
    return Failure(
        f"{seed}:{number}", case.kind, tuple(wrong), [_short(word) for word in argv],
        [_short(change) for change in changes] + [f"{k}={_short(v)}" for k, v in environ.items()],
        ascii(said[-1][:300]) if said else "",
    )  # fmt: skip


def _short(value) -> str:
    text = str(value) if isinstance(value, str) or hasattr(value, "how") else repr(value)
    text = text if len(text) <= 160 else f"{text[:120]}… ({len(text)} characters)"
    return text if text.isprintable() and text.isascii() else ascii(text)


def prepared(folder: Path | None = None) -> Path:
    """A folder with the sound inputs."""
    root = Path(folder or tempfile.mkdtemp(prefix="spimpi-fuzz-")).resolve()
    (root / "sound").mkdir(parents=True)
    sound.make(root / "sound")
    return root


def place_of(root: Path, name: str) -> Path:
    """A worker's folder: one for its cases, and beside it what these try to lead to."""
    import h5py

    worker = root / name
    (worker / "cases").mkdir(parents=True)
    (worker / "outside").mkdir()
    (worker / "outside/secret").write_text("the content of another file\n" * 10)
    with h5py.File(worker / "outside/secret.h5", "w") as file:
        file["secret"] = [42] * 4096
    return worker


def campaign(seed: int, n: int, jobs: int, root: Path, report) -> list[Failure]:
    """Run cases 0 to n - 1 in ``jobs`` worker processes; ``report`` is called with each failure."""
    read, write = os.pipe()
    pids = []
    for worker in range(jobs):
        place = place_of(root, f"worker-{worker}")
        pid = os.fork()
        if pid == 0:
            os.close(read)
            _work(seed, range(worker, n, jobs), root, place, write)
        pids.append(pid)
    os.close(write)
    failures = []
    try:
        with os.fdopen(read) as results:  # lines of all workers, each written in one piece
            for line in results:
                failures.append(Failure(**json.loads(line)))
                report(failures[-1])
        for pid in pids:
            _, status = os.waitpid(pid, 0)
            if status:
                msg = f"a worker of the campaign ended with {os.waitstatus_to_exitcode(status)}"
                raise RuntimeError(msg)
    except BaseException:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                pass
        raise
    return failures


def _work(seed, numbers, root, worker, write) -> None:
    status = 1
    try:
        for number in numbers:
            failure = one(seed, number, root, worker)
            if failure is not None:  # less than a pipe takes at once
                os.write(write, json.dumps(asdict(failure)).encode() + b"\n")
            if number // TELL > (number - numbers.step) // TELL:
                print(f"case {number} of {numbers.stop}", file=sys.stderr, flush=True)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        print(f"case {seed}:{number}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def tell(failure: Failure) -> None:
    print(f"\n{failure.case}  {failure.kind}: {'; '.join(failure.wrong)}")
    print(f"  command  spimpi {shlex.join(failure.argv)}")
    for change in failure.changes:
        print(f"  changed  {change}")
    if failure.last:
        print(f"  said     {failure.last}")
    print(f"  replay   python tests/fuzz/campaign.py --replay {failure.case}", flush=True)


def replay(seed: int, number: int, root: Path) -> int:
    """One case again, whole; its folder stays."""
    case = draw(seed, number, root / "sound")
    worker = place_of(root, "replayed")
    folder = worker / "cases" / f"case-{number}"
    outcome, wrong = attempt(case, case.changes, folder, Outside(worker, root / "sound", but="cases"))
    argv, environ = _command(case, case.changes)
    print(f"cd {folder}")
    print(" ".join(f"{k}={ascii(v)}" for k, v in environ.items()), "spimpi", ascii(argv))
    for change in case.changes:
        print("changed ", ascii(str(change))[:2000])
    print(f"status {outcome.status}, {outcome.seconds:.1f} s, {outcome.peak >> 20} MiB")
    print(ascii(outcome.out[-3000:]), ascii(outcome.err[-6000:]).replace("\\n", "\n"), sep="\n")
    print("WRONG: " + "; ".join(wrong) if wrong else "as it should")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="cases (default: 300)")
    parser.add_argument("--seed", type=int, default=1069, help="of the cases (default: 1069)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--replay", metavar="SEED:NUMBER", help="one case again; its folder is kept")
    parser.add_argument("--folder", help="a new folder to work in (default: a temporary one)")
    args = parser.parse_args()
    load()
    root = prepared(args.folder)
    if args.replay:
        seed, _, number = args.replay.partition(":")
        return replay(int(seed), int(number), root)
    start = time.monotonic()
    failures = campaign(args.seed, args.n, args.jobs, root, tell)
    took = time.monotonic() - start
    counted = Counter(what for failure in failures for what in set(_kinds(failure.wrong)))
    print(f"\n{args.n} cases of {len(KINDS)} kinds in {took:.0f} s, seed {args.seed}: ", end="")
    print(f"{len(failures)} wrong", dict(counted.most_common()) if failures else "")
    print(f"limits: {SECONDS:.0f} s, {MEMORY >> 30} GiB")
    if args.folder is None:
        shutil.rmtree(root, ignore_errors=True)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
