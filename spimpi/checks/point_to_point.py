"""Checks between two ranks: a pipeline's hand-off, and a chain of them.

A hand-off is settled by its two ends alone: one record each way (checks/link_record.py), on a
communicator of their own. Both judge the same two records, so that both have the same verdict.
"""

import hashlib
from dataclasses import replace

import numpy as np
from mpi4py import MPI

from spimpi.checks.blame import findings
from spimpi.checks.check import Check, Rule
from spimpi.checks.link_record import (
    CLOSED, HANDED_ON, LINK_RECORD, NOT_GIVEN, dims_of, order_problem, shape_problem,
    usage_problem,
)  # fmt: skip
from spimpi.checks.pending import built, enforce, in_words, require_comm
from spimpi.checks.requests import wait
from spimpi.checks.session import Link, Pair, pair_of
from spimpi.checks.verdict import Verdict, Where
from spimpi.errors import UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.tag import DEFAULT_SEED, Tag, absorb
from spimpi.trace.schema import Established

NAME = "pipeline hand-off"


def verify_pipeline_handoff(
    comm, activations, from_rank, to_rank, tag, *, sequence=None, microbatch=None, layers=None,
    where=None, check=True, ctx=None, threads=1,
) -> Verdict:  # fmt: skip
    """Check a hand-off after it: the receiver's buffer, and what both ends say that it is.

    Called by ``from_rank`` and ``to_rank`` alone, each with its own buffer, once its send or
    receive is complete. sequence: number of the hand-off (None: counted for each link and name of
    the tag); layers: (first, last); where: which part of the tensor the buffer is. Establishes
    moved. Collective over the two ends, which raise the same errors.
    """
    ends = _ends(comm, from_rank, to_rank)
    pair = pair_of(comm, *ends, ctx)
    name = (tag.seed, tag.name) if isinstance(tag, Tag) else None
    link = pair.links.setdefault((from_rank, name), Link())
    c = _check(activations, tag, where, ends, comm.rank, threads)
    if sequence is not None:
        link.sequence = int(sequence)
    exchange = _Exchange(
        pair, link, c, ends, comm.rank, _words(HANDED_ON, link, c, microbatch, layers)
    )
    link.sequence += 1
    return _settled(exchange, check, ctx)


class HandoffChain:
    """A sequence of hand-offs from one rank to another, kept by both ends.

    Counts them, and compares a running digest of all of them with each. ``close`` (or the end of a
    ``with`` block) tells whether both ends had as many. Made and used by the two ends alone.
    """

    def __init__(
        self, comm, from_rank, to_rank, name, *, seed=DEFAULT_SEED, ctx=None, threads=1
    ):
        self.name, self.seed, self.ctx, self.threads = name, seed, ctx, threads
        self.closed = False
        # The pair's communicator is made at the first hand-off: made here, the chains of a ring
        # would wait for each other.
        self._comm, self._ends = comm, _ends(comm, from_rank, to_rank)
        self._link = Link()

    @property
    def _pair(self) -> Pair:
        return pair_of(self._comm, *self._ends, self.ctx)

    @property
    def n_handoffs(self) -> int:
        """How many hand-offs this end has made so far."""
        return self._link.sequence

    def verify(
        self, activations, *, step=0, layer=-1, microbatch=None, layers=None, where=None,
        check=True,
    ) -> Verdict:  # fmt: skip
        """Check the next hand-off; arguments and errors as for verify_pipeline_handoff."""
        self._require_open()
        tag = Tag(self.seed, self.name, layer, step)
        c = _check(activations, tag, where, self._ends, self._comm.rank, self.threads)
        words = _words(HANDED_ON, self._link, c, microbatch, layers)
        exchange = _Exchange(
            self._pair, self._link, c, self._ends, self._comm.rank, words, self
        )
        self._link.sequence += 1
        return _settled(exchange, check, self.ctx)

    def close(self, *, check=True) -> Verdict:
        """End the chain: both ends must have made as many hand-offs. Collective over the two."""
        self._require_open()
        c = Check(NAME, Tag(self.seed, self.name), Rule.LOCAL, Established.MOVED)
        words = _words(CLOSED, self._link, c, None, None)
        exchange = _Exchange(
            self._pair, self._link, c, self._ends, self._comm.rank, words, self
        )
        return _settled(exchange, check, self.ctx)

    def _require_open(self):
        if self.closed:
            msg = f"the chain of hand-offs {self.name!r} is closed"
            raise UsageError(msg)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None and not self.closed:
            self.close()


def _ends(comm, from_rank, to_rank) -> tuple[int, int]:
    """Raise UsageError, on this rank alone, unless it is one of two different ranks."""
    require_comm(comm)
    ends = from_rank, to_rank
    if not all(isinstance(r, (int, np.integer)) and 0 <= r < comm.size for r in ends):
        msg = f"a hand-off's ends are ranks 0..{comm.size - 1}, found {from_rank!r} and {to_rank!r}"
        raise UsageError(msg)
    if from_rank == to_rank or comm.rank not in ends:
        msg = (
            f"a hand-off is checked by its two ends alone: from rank {from_rank} to rank "
            f"{to_rank}, called on rank {comm.rank}"
        )
        raise UsageError(msg)
    return int(from_rank), int(to_rank)


def _check(array, tag, where, ends, rank, threads) -> Check:
    c = Check(NAME, tag, Rule.MOVED, Established.MOVED, threads)
    return built(c, lambda c: (c.gives if rank == ends[0] else c.gets)(array, where))


def _words(kind, link, c: Check, microbatch, layers) -> dict:
    """What this end says of the hand-off; an error of this end is kept in the check."""
    words = {"kind": kind, "sequence": link.sequence, "running": link.running}
    blocks = c.contributed or c.held
    try:
        first, last = layers if layers is not None else (None, None)
        for name, value in (("microbatch", microbatch), ("first_layer", first),
                            ("last_layer", last)):  # fmt: skip
            words[name] = NOT_GIVEN if value is None else int(value)
        if blocks:
            array, slab = blocks[0]
            words["dims"], words["n_dims"] = dims_of(array.shape), array.ndim
            words["dtype"] = array.dtype.name.encode()[:16]
            words["place"] = _digest(repr(slab))
    except UsageError as error:
        c.error = c.error or error
    except (TypeError, ValueError):
        msg = (
            f"layers are (first, last) and a microbatch is a number, found {layers!r} and "
            f"{microbatch!r}"
        )
        c.error = c.error or UsageError(msg)
    if isinstance(c.tag, Tag):
        words |= {"step": c.tag.step, "layer": c.tag.layer, "seed": c.tag.seed}
        words["name"] = _digest(c.tag.name)
    words["fingerprint"] = c.given ^ c.got
    words["error"] = c.error is not None
    return words


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _settled(exchange, check, ctx):
    if ctx is not None:
        exchange.check.tracer, exchange.attendance = ctx.tracer, ctx.attendance
    if ctx is not None and ctx.open_batch is not None:
        return ctx.open_batch.add_handoff(exchange.order, exchange.finish, check)
    return enforce(exchange.finish(), check)


class _Exchange:
    """The records of one hand-off under way between its two ends."""

    def __init__(self, pair: Pair, link: Link, c: Check, ends, rank, words, chain=None):
        self.pair, self.link, self.check, self.ends, self.chain = pair, link, c, ends, chain
        self.own, self.other = np.zeros((2, 1), LINK_RECORD)
        for name, value in words.items():
            self.own[name] = value
        self.own["from_rank"] = ends[0]
        self.peer, self.rank, self.attendance = pair.peer, rank, None
        # The two directions between two ranks do not wait for each other.
        direction = int(ends[0] > ends[1])
        self.requests = [
            pair.comm.Irecv([self.other.view(np.uint8), MPI.BYTE], self.peer, direction),
            pair.comm.Isend([self.own.view(np.uint8), MPI.BYTE], self.peer, direction),
        ]

    @property
    def order(self) -> tuple:
        """Where this hand-off comes when many are finished: all ranks must have one order."""
        return min(self.ends), max(self.ends), self.ends[0]

    def finish(self) -> Verdict:
        """Wait for the other end's record, and judge. The same on both ends."""
        for request in self.requests:
            wait(request, None, self.attendance, in_words([self.check]), self.pair.comm)
        sends = self.rank == self.ends[0]
        records = [self.own[0], self.other[0]][:: 1 if sends else -1]
        sent, waited = records
        self._require_one_tensor(records)
        problem = order_problem(sent, waited)
        if not problem:
            self._refuse(shape_problem(records, self.ends))
        closing = CLOSED in (sent["kind"], waited["kind"])
        if self.chain is not None and closing:
            self.chain.closed = True
        word = int(sent["fingerprint"])
        self.link.running = absorb(self.link.running, word)
        if problem:
            # From here on both ends count from what the sender said.
            self.link.running = absorb(int(sent["running"]), int(waited["running"]))
            verdict = self._failed(sent, waited, None, problem, ())
        elif sent["fingerprint"] != waited["fingerprint"]:
            verdict = self._other_content(sent, waited)
        else:
            verdict = Verdict(
                True, Established.MOVED, check=NAME, expected=word, actual=word
            )
        if not closing and not problem:
            slab = (self.check.contributed or self.check.held)[0][1]
            self.link.history.append((int(sent["sequence"]), self.check.tag, slab, word))
        if self.check.tracer is not None:
            self.check.tracer.record(
                self.check, verdict, self.pair.comm, self.peer, sequence=self.own["sequence"][0],
                microbatch=max(int(self.own["microbatch"][0]), -1),
            )  # fmt: skip
        return verdict

    def _require_one_tensor(self, records) -> None:
        """UsageError on both ends where one has an error, or they hand on different tensors."""
        errors = [bool(r["error"]) for r in records]
        alike = not any(errors) and not usage_problem(records, self.ends, ("", ""))
        if alike and records[0]["name"] == records[1]["name"]:
            return
        name = getattr(self.check.tag, "name", self.check.tag)
        error = self.check.error and str(self.check.error)
        theirs = self.pair.comm.sendrecv((name, error), dest=self.peer, source=self.peer)
        both = [(name, error), theirs][:: 1 if self.rank == self.ends[0] else -1]
        told = [f"rank {r}: {e}" for r, (_, e) in zip(self.ends, both) if e]
        self._refuse("; ".join(told) or usage_problem(records, self.ends, [n for n, _ in both]))

    def _refuse(self, problem: str) -> None:
        if problem:
            self.link.sequence = int(self.own["sequence"][0])  # it does not count, at both ends
            msg = f"hand-off from rank {self.ends[0]} to rank {self.ends[1]}: {problem}"
            raise UsageError(msg) from self.check.error

    def _other_content(self, sent, waited) -> Verdict:
        """What the receiver holds instead. Collective over the two ends."""
        c, comm = self.check, self.pair.comm
        alone = self.pair.alone
        history = {(tag, slab): word for _, tag, slab, word in self.link.history}
        found = findings(alone, c, None, history)
        stale = self._earlier() if c.held else None
        theirs = comm.sendrecv(
            (stale, MPI.Get_processor_name()), dest=self.peer, source=self.peer
        )
        details = [stale or theirs[0] or "", found.text if found else ""]
        elements = tuple(replace(e, rank=self.ends[1]) for e in found.elements) if found else ()
        host = MPI.Get_processor_name() if c.held else theirs[1]
        details.append(f"received from rank {self.ends[0]}")
        text = "; ".join(d for d in details if d)
        return self._failed(sent, waited, self.ends[1], text, elements, host)

    def _earlier(self) -> str | None:
        """Which of the link's last buffers the receiver still holds, in words."""
        array, _ = self.check.held[0]
        for sequence, tag, slab, word in reversed(self.link.history):
            try:
                same = fingerprint(array, tag, slab, self.check.threads) == word
            except UsageError:  # a buffer of another shape
                continue
            if same:
                return f"a stale buffer: that of sequence {sequence} (step {tag.step})"
        return None

    def _failed(self, sent, waited, rank, detail, elements, host="") -> Verdict:
        tag = self.check.tag
        words = [int(r["fingerprint"]) for r in (sent, waited)]
        microbatch = int(waited["microbatch"])
        where = Where(
            NAME, tag.name, tag.step, tag.layer, max(microbatch, -1), rank, host, self.ends[1],
            *(f"{w:016x}" for w in words), detail, elements=elements,
        )  # fmt: skip
        return Verdict(
            False, Established(0), where, check=NAME, expected=words[0], actual=words[1]
        )
