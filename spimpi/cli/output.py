"""What ``spimpi verify`` prints on rank 0: what was found, progress, the table, the verdict."""

import os
import sys

from spimpi.checks.verdict import Verdict
from spimpi.cli.progress_lines import ProgressLines
from spimpi.printable import printable
from spimpi.trace.schema import Stage
from spimpi.units import in_bytes

ROWS = (
    ("fabric", "fabric", (Stage.FABRIC,)),
    ("weights", "weights", (Stage.WEIGHTS,)),
    ("inference: compute", "inference", (Stage.COMPUTE,)),
    ("inference: tensor", "inference", (Stage.TENSOR,)),
    ("inference: sequence", "inference", (Stage.SEQUENCE,)),
    ("inference: pipeline", "inference", (Stage.PIPELINE,)),
    ("inference: data", "inference", (Stage.DATA,)),
    ("golden", "inference", (Stage.GOLDEN,)),
)
LAUNCHERS = ("mpirun", "mpiexec", "orterun", "prterun", "mpiexec.hydra", "srun")
GENERATIONS = 5
PROMISES = {
    "moved": "bits arrived",
    "agreed": "replicas are equal",
    "computed": "arithmetic checked",
    "expected": "equals fingerprints known beforehand",
}


class Reporter:
    """Speaks on rank 0 only; a live line on a terminal; silent but for the end with ``as_json``.

    Where there is no live line, a line on standard error says every 10 s where the run is.
    """

    def __init__(self, speaks: bool, as_json: bool):
        self.speaks, self.as_json = speaks, as_json
        self.status = self.lines = None
        self.in_lines = False
        if speaks:
            import rich.table  # noqa: F401  needed at the end
            from rich.console import Console

            terminal = _on_terminal()
            self.console = Console(
                file=sys.stdout, highlight=False, soft_wrap=True, force_terminal=terminal
            )
            if terminal and not as_json:
                self.status = self.console.status("starting")
            else:
                self.in_lines = True

    def progress(self, place: str) -> None:
        """Where the run is; until ``stop``."""
        if self.status is not None:
            from rich.text import Text

            self.status.update(Text(printable(place)))
        elif self.in_lines:
            self.lines = self.lines or ProgressLines()
            self.lines.place = place

    def found(self, comm, job) -> None:
        """MPI, ranks, nodes, topology and model. Collective."""
        from mpi4py import MPI

        hosts = comm.gather(MPI.Get_processor_name())
        if not self.speaks or self.as_json:
            return
        library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip()
        config = job.config
        weights = "files" if job.directory else "seeded weights"
        self._print(f"mpi        {library}")
        self._print(f"ranks      {comm.size} on {len(set(hosts))} node(s): {_short(hosts)}")
        self._print(f"topology   {job.grid.describe()}")
        self._print(
            f"model      {config.name}: {config.n_layers} layers, hidden {config.hidden_size}, "
            f"{config.n_heads}/{config.n_kv_heads} heads, {weights}, "
            f"{job.checkpoint.total_bytes / 2**20:.1f} MiB"
        )
        for line in job.checkpoint.not_read:
            self._print(f"not read   {line}")
        arithmetic = "exact-1" if job.exact else "float32 BLAS (no expected fingerprints)"
        self._print(
            f"workload   {len(job.prompts)} prompts, {sum(job.lengths)} prompt tokens, "
            f"{job.n_tokens} new tokens each, {arithmetic}"
        )
        for fault in job.faults:
            self._print(f"injected   {fault}")
        if self.status is not None:
            self.status.start()

    def stop(self) -> None:
        """Take the live line away; no more lines of progress."""
        if self.status is not None:
            self.status.stop()
            self.status = None
        if self.lines is not None:
            self.lines.stop()
            self.lines = None

    def concluded(self, job, outcome, tracer) -> None:
        """The end: on a failure first of all where; then the table, the text, the verdict."""
        self.stop()
        if not self.speaks:
            return
        if self.as_json:
            from spimpi.cli.verify import as_json

            print(as_json(job, outcome, tracer))
            return
        verdict, tokens = outcome.verdict, outcome.answer()
        if verdict.where is not None:
            self._where(verdict)
        self._table(outcome)
        self._texts(job, tokens)
        if tracer:
            self._print(f"trace      {tracer.path} ({outcome.n_events} checks)")
        self._verdict(job, outcome)

    def _print(self, text, style=None):
        self.console.print(printable(text), style=style, markup=False)

    def _where(self, verdict):
        where = verdict.where
        self._print("")
        self._print("CORRUPTION FOUND", style="bold red")
        self._print(f"  step      {where.step}" + (f" of run {where.repeat}" if where.repeat else ""))
        self._print(f"  layer     {where.layer if where.layer >= 0 else 'none'}")
        self._print(f"  tensor    {where.tensor}")
        rank = f"{where.rank} ({where.host})" if where.rank is not None else "not singled out"
        self._print(f"  rank      {rank}")
        self._print(f"  check     {where.check}, seen by rank {where.recorded_by}")
        self._print(f"  expected  {where.expected}")
        self._print(f"  found     {where.found}")
        if where.detail:
            self._print(f"  note      {where.detail}")

    def _table(self, outcome):
        from rich.table import Table

        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("stage")
        for name in ("checks", "failed", "bytes", "seconds", "checking"):
            table.add_column(name, justify="right")
        for label, timed, stages in ROWS:
            checks = sum(outcome.totals[s].checks for s in stages)
            if not checks:
                continue
            failed = sum(outcome.totals[s].failed for s in stages)
            covered = sum(outcome.totals[s].n_bytes for s in stages)
            spent = sum(outcome.totals[s].seconds for s in stages)
            total = outcome.seconds[timed]
            share = f"{min(100.0, 100 * spent / total):.1f}%" if total else "-"
            table.add_row(
                label, f"{checks:,}", f"{failed:,}", in_bytes(covered), f"{total:.2f}", share
            )
        self._print("")
        self.console.print(table)

    def _texts(self, job, answer):
        from spimpi.inference.prompts import decode

        self._print("")
        answer = answer or []
        texts = decode([*answer, *job.prompts], job.config, job.directory)
        prompts = job.texts or texts[len(answer) :]
        for i, (tokens, text, asked) in enumerate(zip(answer, texts, prompts)):
            shown = repr(text) if text is not None else f"tokens {tokens}"
            prompt = repr(asked) if asked is not None else f"prompt {i}"
            self._print(f"  {prompt} -> {shown}")

    def _verdict(self, job, outcome):
        verdict: Verdict = outcome.verdict
        self._print("")
        if outcome.n_failed:
            self._print(
                f"verdict    CORRUPTED: {outcome.n_failed:,} of {outcome.n_events:,} checks failed; "
                f"first: {verdict.where}",
                style="bold red",
            )
            return
        if verdict.missing:
            self._print(f"verdict    INCOMPLETE: {'; '.join(verdict.missing)}", style="bold yellow")
            return
        proofs = "; ".join(f"{kind} ({PROMISES[kind]})" for kind in verdict.kinds)
        runs = f", {outcome.completed_runs} runs" if outcome.completed_runs > 1 else ""
        self._print(
            f"verdict    VERIFIED: {outcome.n_events:,} checks{runs}; {proofs}", style="bold green"
        )
        if outcome.expected_from:
            self._print(f"           expected fingerprints: {outcome.expected_from}")
        else:
            why = "no golden run to compare with"
            if not job.exact:
                why = "--arith blas has no reproducible fingerprints"
            self._print(f"           'expected' is not established: {why}")
        if job.golden is not None and job.golden.weights is None:
            self._print("weights    not compared with the golden file, which has no fingerprints of them")
        if job.known:
            more = " and what is derived from them" if job.has_derived else ""
            self._print(f"weights    expected: they{more} equal {job.known.file}")


def _on_terminal() -> bool:
    """Whether people watch: mpirun gives its ranks a terminal even where it has none itself."""
    if not sys.stdout.isatty():
        return False
    from spimpi.launch import launch

    if launch() is None:
        return True
    pid = os.getpid()
    try:
        for _ in range(GENERATIONS):  # a shell may stand between mpirun and its rank
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
            with open(f"/proc/{pid}/comm") as file:
                name = file.read().strip()
            if name in LAUNCHERS:
                return os.readlink(f"/proc/{pid}/fd/1").startswith(("/dev/pts", "/dev/tty"))
    except (OSError, ValueError):
        pass
    return False


def _short(hosts) -> str:
    names = sorted(set(hosts))
    shown = ", ".join(names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
