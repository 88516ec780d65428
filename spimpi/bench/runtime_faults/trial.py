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
DISAGREE = -1  # a status: ranks ended with several
WEIGHTS = "weights"  # among what a fault shows: any tensor of the checkpoint
OF_NO_LAYER = ("prompts", "embed", "last_rows", "logits", "tokens")


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


def run_once(comm, job, now, heard) -> "Ended":
    """How a run of ``job`` ends, with these listeners beside the usual ones. Collective."""
    now.restart()
    logits = Logits()
    listeners = {place: [one] for place, one in clock(now).items()}
    listeners[f"{HEAD}.sample"].append(logits.listen)
    for place, several in heard.items():
        listeners.setdefault(place, []).extend(several)
    with patched(now, listeners):
        try:
            outcome = verify_distributed_inference(comm, job)
            return Ended(outcome.exit_status, str(outcome.verdict), outcome.verdict.where, logits,
                         outcome.answer())  # fmt: skip
        except SpimpiError as error:
            where = getattr(getattr(error, "verdict", None), "where", None)
            return Ended(error.exit_status, str(error), where, logits, None)


@dataclass
class Ended:
    """How a run ended on this rank: exit status, verdict, logits, and the text that it would print."""

    status: int
    said: str
    where: object
    logits: Logits
    text: list | None


def run_trial(comm, mode, job, fault: Fault, moment_of, rank, clean, seed) -> Row:
    """Run ``job`` with a fault armed. ``moment_of``: each rank's moment, None where it is spared;
    rank: the one that was chosen; clean: how the clean run ended here. Collective."""
    now, own = Now(), moment_of[comm.rank]
    armed = Armed(now, fault, own, np.random.default_rng(seed))
    ended = run_once(comm, job, now, {fault.place: [armed.listen]})
    own = armed.hand.struck, ended.logits.same_as(clean.logits), ended.text == clean.text
    everyone = comm.allgather((*own, ended.status, ended.said, ended.where))
    struck, same_logits, same_text, statuses, words, places = zip(*everyone)
    # A rank alone may know, as rank 0 does of what it prints: its status is the job's.
    telling = next((r for r, status in enumerate(statuses) if status), 0)
    status, said, where = statuses[telling], words[telling], places[telling]
    if len({s for s in statuses if s}) > 1:
        status, said = DISAGREE, f"ranks disagree: {statuses}: {' | '.join(sorted(set(words)))}"
    differs = NOTHING if all(same_logits) else LOGITS
    if status == 0 or where is not None:
        differs = differs if all(same_text) else TEXT
    moment = moment_of[rank]
    return Row(
        mode.name, job.golden is not None, fault.name, *moment[1:3], rank, any(struck), differs,
        status, _right_place(fault, where, moment),
        _right_rank(where, None if fault.alike else rank), said,
    )  # fmt: skip


def _right_place(fault, where, moment) -> bool:
    part, step, layer, *_ = moment
    if where is None:
        return False
    if where.tensor not in PROGRAM or where.tensor == "rotary":  # of no step: looked at last
        return where.tensor in fault.shows or WEIGHTS in fault.shows
    if where.tensor not in fault.shows:
        return False
    if step < 0 or part == "comparing":  # of no step, or of several
        return True
    if where.step not in ({step - 1, step, step + 1} if fault.later else {step}):
        return False
    if layer < 0 or where.tensor in OF_NO_LAYER:
        return True
    return where.layer in ((layer, layer - 1) if where.tensor == "hidden" else (layer,))


def _right_rank(where, rank) -> str:
    if where is None or where.rank is None:
        return "none"
    return "right" if rank is None or where.rank == rank else "wrong"
