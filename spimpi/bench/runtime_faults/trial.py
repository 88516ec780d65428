"""One trial: a fault armed at one moment of a run, and what the run made of it."""

from dataclasses import dataclass

import numpy as np

from spimpi.bench.runtime_faults.clock import HEAD, Logits, clock
from spimpi.bench.runtime_faults.fault import Fault, Hand
from spimpi.bench.runtime_faults.hooks import Now, patched
from spimpi.errors import SpimpiError
from spimpi.inference.tensors import PROGRAM
from spimpi.verification.run import verify_distributed_inference

TEXT, LOGITS, NOTHING = "text", "logits", "nothing"
WEIGHTS = "weights"  # among what a fault shows: any tensor of the checkpoint
OF_NO_LAYER = ("embed", "last_rows", "logits", "tokens")


@dataclass(frozen=True)
class Row:
    """What a trial found. differs: TEXT, LOGITS or NOTHING, against the clean run; status: the exit
    status; place, rank: whether the verdict names the right ones (rank: "right", "none", "wrong")."""

    mode: str
    golden: bool
    fault: str
    step: int
    layer: int
    struck_rank: int
    struck: bool
    differs: str
    status: int
    place: bool
    rank: str
    said: str

    @property
    def unseen(self) -> bool:
        """Whether text or logits differ and the verdict is that all is well."""
        return self.struck and self.status == 0 and self.differs != NOTHING


class Census:
    """Counts, in a clean run, at which moments each fault could strike on this rank."""

    def __init__(self, now, faults):
        self.now, self.moments = now, {fault.name: [] for fault in faults}
        self.faults = faults

    def listeners(self) -> dict:
        heard = {}
        for fault in self.faults:
            heard.setdefault(fault.place, []).append(self._listener(fault))
        return heard

    def _listener(self, fault):
        found, counts = self.moments[fault.name], {}

        def listen(call):
            if fault.only(call):
                key = self.now.key
                n = counts[key] = counts.get(key, 0) + 1
                found.append((*key, n))
            call.proceed()

        return listen


class Armed:
    """A fault that strikes once, at a moment; None: never."""

    def __init__(self, now, fault, moment, rng):
        self.now, self.fault, self.moment, self.hand = now, fault, moment, Hand(rng)
        self.counts = {}

    def listen(self, call):
        if self.moment is None or not self.fault.only(call):
            call.proceed()
            return
        key = self.now.key
        n = self.counts[key] = self.counts.get(key, 0) + 1
        if (*key, n) == self.moment:
            self.fault.strike(call, self.hand)
        else:
            call.proceed()


def run_once(comm, job, now, heard):
    """(outcome or the error that all ranks raised, logits here, text). Collective."""
    now.restart()
    logits = Logits()
    listeners = {place: [one] for place, one in clock(now).items()}
    listeners[f"{HEAD}.sample"].append(logits.listen)
    for place, several in heard.items():
        listeners.setdefault(place, []).extend(several)
    with patched(now, listeners):
        try:
            outcome = verify_distributed_inference(comm, job)
        except SpimpiError as error:
            outcome = error
    text = getattr(outcome, "tokens", None)
    return outcome, logits, None if text is None else text.tolist()


def run_trial(comm, mode, job, fault: Fault, moment_of, rank, clean, seed) -> Row:
    """Run ``job`` with a fault armed. ``moment_of``: each rank's moment, None where it is spared;
    rank: the one that was chosen; clean: (logits, text) of the clean run here. Collective."""
    now, own = Now(), moment_of[comm.rank]
    armed = Armed(now, fault, own, np.random.default_rng(seed))
    outcome, logits, text = run_once(comm, job, now, {fault.place: [armed.listen]})
    said = str(outcome) if isinstance(outcome, SpimpiError) else str(outcome.verdict)
    status = outcome.exit_status
    everyone = comm.allgather(
        (armed.hand.struck, logits.same_as(clean[0]), text == clean[1], status, said)
    )
    struck, same_logits, same_text, statuses, words = zip(*everyone)
    if len(set(statuses)) > 1 or len(set(words)) > 1:
        status, said = -1, f"ranks disagree: {statuses}: {' | '.join(sorted(set(words)))}"
    ended_well = not isinstance(outcome, SpimpiError)
    differs = NOTHING if all(same_logits) or not ended_well else LOGITS
    differs = TEXT if ended_well and not all(same_text) else differs
    part, step, layer, *_ = moment_of[rank]
    where = outcome.verdict.where if ended_well else None
    chosen = None if fault.alike else rank
    return Row(
        mode.name, job.golden is not None, fault.name, step, layer, rank, any(struck), differs,
        status, _right_place(fault, where, step, layer), _right_rank(where, chosen), said,
    )  # fmt: skip


def _right_place(fault, where, step, layer) -> bool:
    if where is None:
        return False
    if where.tensor not in PROGRAM:
        return WEIGHTS in fault.shows
    if where.tensor not in fault.shows:
        return False
    steps = {max(step, 0), max(step, 0) + 1} if fault.later else {max(step, 0)}
    if where.step not in steps:
        return False
    if where.tensor in OF_NO_LAYER:
        return True
    return layer < 0 or where.layer == layer or (where.tensor == "hidden" and where.layer == layer - 1)


def _right_rank(where, rank) -> str:
    if where is None or where.rank is None:
        return "none"
    return "right" if rank is None or where.rank == rank else "wrong"
