"""``verify_distributed_inference``: what ``spimpi verify`` runs."""

import math
from contextlib import suppress
from dataclasses import replace
from time import perf_counter, sleep

import numpy as np
from mpi4py import MPI

from spimpi.checks.fabric import check_fabric, tensor_names
from spimpi.checks.pending import require_comm
from spimpi.checks.recorder import Recorder
from spimpi.checks.verdict import Verdict
from spimpi.context import DistributedContext
from spimpi.errors import ArgumentKindError, CorruptionError, SpimpiError, UsageError
from spimpi.inference import golden as golden_runs
from spimpi.inference.derived import derived_names
from spimpi.inference.derived_check import check_derived, multiplied
from spimpi.inference.finite import holds_not_finite, named_not_finite
from spimpi.inference.footprint import rank_bytes, require_memory
from spimpi.inference.model import Stage
from spimpi.inference.schedule import expected_events
from spimpi.inference.standing import check_standing
from spimpi.inference.tensors import program_tensors
from spimpi.inference.token_words import token_keys, token_words
from spimpi.inference.weight_check import (
    check_weights, from_rank_0, second_read, weight_names,
)  # fmt: skip
from spimpi.inference.weights import Loader
from spimpi.reduction import PATIENCE, together
from spimpi.topology.data import rows_of
from spimpi.topology.grid import choose
from spimpi.topology.sequence import split_rows
from spimpi.trace.journals.signals import flushed_on_signals
from spimpi.trace.schema import Established
from spimpi.verification import conclude, overflow
from spimpi.verification.answer import Answer
from spimpi.verification.job import Job, Request, prepare
from spimpi.watchdog import Unwatched

GOLDEN_BYTES = 64 << 20  # weights up to this size get a golden run on the fly


class Quiet:
    """A reporter that says nothing."""

    def progress(self, place: str) -> None:
        pass


def trace_tensor_names(job: Job) -> list[str]:
    """Names in the trace's table of tensors, in program order."""
    weights = weight_names(job.checkpoint, job.config, job.grid)
    if job.has_derived:
        weights += [n for name in multiplied(job.config) for n in derived_names(name)]
    return tensor_names() + weights + program_tensors(job.config.qk_norm)


def verify_distributed_inference(
    comm, job: Job | Request, reporter=None, watchdog=None, tracer=None
) -> conclude.Outcome:
    """Fabric, weights, inference, golden comparison, trace, verdict, as ``spimpi verify`` does it.

    ``job``: a Request, as the command line's options, or the Job that ``prepare`` made of one for
    ``comm.size`` ranks. ``tracer`` is a spimpi.verification.tracing.Tracer; None writes no trace.
    What fails is in the Outcome, no exception. Collective over ``comm``: every rank returns the
    same outcome or raises the same error (UsageError for what cannot be run).
    """
    require_comm(comm, "a run")
    if not isinstance(job, (Job, Request)):
        msg = (
            "what is to be verified is a spimpi.Request, or the Job that prepare made of one, "
            f"found {type(job).__name__}"
        )
        raise ArgumentKindError(msg)
    if isinstance(job, Request):
        with together(comm):
            job = prepare(job, comm.size, comm.rank)
    with DistributedContext(comm, job.grid, job.seed) as ctx:
        return _Run(ctx, job, reporter or Quiet(), watchdog, tracer).whole()


def make_golden(job: Job, at=None) -> golden_runs.Golden:
    """The golden run of a job, on this rank alone; ``at`` is told where it is. Local."""
    alone = replace(
        job, grid=choose(1, job.config.n_heads, job.config.n_layers), golden=None, faults=(), repeat=1,
        known=None,  # the run's own check of the weights tells more
    )  # fmt: skip
    with DistributedContext(MPI.COMM_SELF, alone.grid, job.seed) as ctx:
        run = _Run(ctx, alone, Quiet(), None)
        run.recorder.most_kept = math.inf  # for overflow.same_twice
        with together(ctx.world, PATIENCE):
            require_memory(ctx, run.wanted_bytes())
        stage = run.stage(run.weights())
        prompts = [np.asarray(p, np.int64) for p in job.prompts]
        progress = (lambda step: at(f"golden run, token {step + 1} of {job.n_tokens}")) if at else None
        tokens = stage.run(prompts, progress=progress)
        where = conclude.first_failure(ctx, run.recorder, run.names)
        if where is not None and overflow.only_overflow(ctx.world, run.recorder):
            stage.run(prompts, 1, progress)
            if overflow.same_twice(run.recorder):
                overflow.refuse(where, job.checkpoint, ", and twice alike")
        if where is not None:
            said = "; ".join(filter(None, ["in the golden run, on rank 0 alone", where.detail]))
            raise CorruptionError(Verdict(False, Established(0), replace(where, detail=said)))
        keys = token_keys(job.seed, len(prompts), job.n_tokens)
        if not np.array_equal(token_words(tokens, keys), stage.chosen):
            said = "the golden run's, on rank 0 alone, are no longer those that it chose"
            raise CorruptionError(conclude.tokens_changed(said))
    weights = np.array([run.loader.part.shares[n] for n in job.checkpoint.tensors], np.uint64)
    return golden_runs.Golden(
        job.workload, job.config.n_layers, stage.golden.copy(), tokens, "made on one rank",
        job.origin, weights,
    )  # fmt: skip


class _Run:
    def __init__(self, ctx, job, reporter, watchdog, tracer=None):
        self.ctx, self.job, self.reporter, self.tracer = ctx, job, reporter, tracer
        self.watchdog = watchdog or Unwatched()
        self.names = trace_tensor_names(job)
        index = {name: i for i, name in enumerate(self.names)}
        self.recorder = Recorder(index, ctx.rank)
        self.seconds: dict[str, float] = {}
        self.injector = self._injector()
        self.golden, self.loader = None, None
        small = job.checkpoint.total_bytes <= GOLDEN_BYTES
        self.has_golden = job.exact and ctx.world.bcast(job.golden is not None or small)

    def whole(self):
        ctx, job = self.ctx, self.job
        ctx.hosts, ctx.n_nodes  # noqa: B018  collective on first use, hence here
        with together(ctx.world, PATIENCE):
            require_memory(ctx, self.wanted_bytes())
        if self.tracer is None:
            return self._verify()
        self._at("opening the trace")
        with together(ctx.world, PATIENCE):
            if ctx.rank == 0:
                self.tracer.prepare()
        self.watchdog.before_abort = self.recorder.write_down
        with flushed_on_signals(self.recorder.write_down):
            try:
                self.recorder.journal = self.tracer.open(ctx, job, self.names)
                outcome = self._verify()
            except UsageError:
                self.tracer.give_up(refused=True)
                raise
            except BaseException:
                with suppress(Exception):  # the run's own error is what is to be told
                    self.recorder.write_down()
                self.tracer.give_up()
                raise
            self._at("sealing the trace")
            self.tracer.seal(ctx, outcome)
        return outcome

    def _verify(self):
        ctx = self.ctx
        self._timed("fabric", lambda: check_fabric(ctx, self.recorder, self._at))
        part = self._timed("weights", self.weights)
        self._prepare_golden()
        tokens, words, runs = self._timed("inference", lambda: self._inference(part))
        if self.job.has_derived:
            start = perf_counter()
            self._check_derived(step=self.job.n_tokens - 1)
            self.seconds["weights"] += perf_counter() - start
        self._at("verdict")
        return self._conclude(tokens, words, runs)

    def _at(self, place):
        self.watchdog.at(place)
        self.reporter.progress(place)

    def _timed(self, name, work):
        self._at(name)
        start = perf_counter()
        result = work()
        self.seconds[name] = perf_counter() - start
        return result

    def _injector(self):
        if not self.job.faults:
            return None
        from spimpi.faults.inject import Injector

        return Injector(self.job.faults, self.ctx, self.job.config, self.job.lengths)

    def _own_rows(self):
        return rows_of(self.job.lengths, self.ctx.grid.dp, self.ctx.place.d)

    def wanted_bytes(self) -> int:
        ctx, job = self.ctx, self.job
        prefill, later = (
            split_rows(job.lengths, ctx.grid, ctx.place.d, step) for step in (0, 1)
        )
        itemsize = max(record.itemsize for record in job.checkpoint.tensors.values())
        most_rows = max(prefill.most_rows, later.most_rows)
        gathered = 0
        if ctx.grid.sp > 1:
            gathered = max(sum(b - a for a, b in m) for m in prefill.pieces + later.pieces)
        return rank_bytes(
            ctx, job.config, itemsize, later.rows.size, max(job.lengths) + job.n_tokens, most_rows,
            gathered,
        )  # fmt: skip

    def weights(self):
        """Load this rank's part and check it against the manifest, else against the second read."""
        ctx, job = self.ctx, self.job
        loader = self.loader = Loader(ctx, job.config, job.checkpoint, job.exact, self.injector)
        with together(ctx.world, PATIENCE):
            loader.load(lambda layer: self._at(f"weights of layer {layer}"))
        if job.known:
            shares = from_rank_0(ctx, job.checkpoint.tensors, job.known.words)
        else:
            self._at("second read of the weights")
            with together(ctx.world, PATIENCE):
                shares = second_read(ctx, job.checkpoint)
        failed = check_weights(
            ctx, job.config, job.checkpoint, loader, shares, self.recorder, bool(job.known)
        )
        if job.has_derived:
            self._check_derived()
        unfit = bool(loader.part.problem) or holds_not_finite(loader.part)
        if ctx.world.allreduce(unfit, op=MPI.LOR) and not ctx.world.allreduce(failed):
            with together(ctx.world, PATIENCE):
                if problem := named_not_finite(job.checkpoint, ctx.rank, ctx.world.size):
                    raise UsageError(problem)
            with together(ctx.world, PATIENCE):
                if loader.part.problem:
                    raise UsageError(loader.part.problem)
        return loader.part

    def _check_derived(self, step=0):
        """What was derived from the weights, as it is in memory now. Collective over the world."""
        self._at("derived weights")
        job = self.job
        check_derived(self.ctx, job.config, self.loader, job.known.words, self.recorder, step)

    def stage(self, part) -> Stage:
        job = self.job
        taken = self.tracer.journal.sketches if self.tracer else None
        return Stage(
            self.ctx, job.config, part, job.lengths, job.n_tokens, job.exact, self.recorder,
            self.injector, self.watchdog, taken and taken.append,
        )  # fmt: skip

    def _prepare_golden(self):
        """Rank 0's golden run: as given, or made now where the model is small. Collective."""
        if not self.has_golden:
            return
        self.golden, error = self.job.golden, None
        self._at("golden run on rank 0")
        if self.ctx.rank == 0 and self.golden is None:
            try:
                self.golden = make_golden(self.job, self._at)
            except SpimpiError as caught:
                error = caught
        # The others sleep meanwhile: rank 0 may need the core, and its own watchdog watches it.
        done = self.ctx.world.Ibarrier()
        while not done.Test():
            sleep(0.01)
            self._at("golden run on rank 0")
        with together(self.ctx.world, PATIENCE):
            if error is not None:
                raise error

    def _inference(self, part):
        ctx, job = self.ctx, self.job
        stage = self.stage(part)
        block = self._own_rows().sequence
        own = [np.asarray(p, np.int64) for p in job.prompts[block[0] : block[-1] + 1]]
        for repeat in range(job.repeat):

            def progress(step, repeat=repeat):
                runs = f", run {repeat + 1} of {job.repeat}" if job.repeat > 1 else ""
                self._at(f"token {step + 1} of {job.n_tokens}{runs}")

            tokens = stage.run(own, repeat, progress)
            check_standing(
                ctx, part, stage.layers, self.recorder, job.n_tokens - 1, repeat
            )
            answer = Answer(ctx, job, stage, self.recorder, repeat)
            tokens = answer.handed_out(tokens)
            self._compare(stage, repeat, tokens)
            if conclude.any_failed(ctx, self.recorder):
                break
        return tokens, answer.words, repeat + 1

    def _compare(self, stage, repeat, tokens):
        """The run's golden table against the golden run's, its tokens too; in a trace also where
        there is none. Collective over the world.
        """
        if not self.has_golden and self.tracer is None:
            return
        table = golden_runs.global_table(self.ctx.world, stage.golden)
        if self.ctx.rank:
            return
        if self.golden is not None:
            golden_runs.compare(table, self.golden, self.recorder, repeat, tokens)
        elif self.tracer is not None:
            golden_runs.record(table, self.job.config.n_layers, self.recorder, repeat)

    def _conclude(self, tokens, words, runs):
        ctx, job = self.ctx, self.job
        changed = self.injector.changed if self.injector else [False] * len(job.faults)
        found = conclude.conclusion(
            ctx, job, self.recorder, self.names, self.has_golden,
            expected_events(ctx, job, runs, self.has_golden), changed,
            self.golden.source if self.golden else "",
            conclude.those_chosen(tokens, words, job.seed),
        )  # fmt: skip
        # Rank 0's word, since a rank may be alone in what it concluded.
        if not self.has_golden and not job.faults and ctx.world.bcast(bool(found.verdict.where)):
            self._refuse_overflow(found.verdict.where)
        return conclude.Outcome(
            found.verdict, found.totals, self.seconds, found.n_events, found.n_failed, tokens,
            found.expected_from, runs, words, job.seed,
        )  # fmt: skip

    def _refuse_overflow(self, where):
        """UsageError where no golden run tells a model that overflows from a fault. Collective."""
        if not overflow.only_overflow(self.ctx.world, self.recorder):
            return
        with together(self.ctx.world, PATIENCE):
            if self.ctx.rank == 0:
                other = "a golden run" if self.job.exact else "--arith exact, with a golden run,"
                how = f", or a fault that no check sees made NaN of it ({other} would tell)"
                overflow.refuse(where, self.job.checkpoint, how)
