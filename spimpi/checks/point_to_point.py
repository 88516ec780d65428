"""Checks between two ranks: a pipeline's hand-off, and a chain of them.

A hand-off is settled by its two ends alone: one record each way (checks/link_record.py), on a
communicator of their own. Both judge the same two records, so that both have the same verdict.

A check after the send sees the send buffer as it is then. Whether it was overwritten before its
send had ended, so that the other end received what came later, shows only beside a fingerprint
that was taken before the send: ``before_send``.
"""

import hashlib
import operator
from dataclasses import replace

import numpy as np
from mpi4py import MPI

from spimpi.checks.at_rest import AtRest, at_rest
from spimpi.checks.blame import findings
from spimpi.checks.check import Check, Rule, place_of
from spimpi.checks.link_record import (
    CLOSED, HANDED_ON, LINK_RECORD, NOT_GIVEN, dims_of, order_problem, shape_problem,
    usage_problem,
)  # fmt: skip
from spimpi.checks.failure import used_again
from spimpi.checks.pending import built, enforce, in_words, require_comm
from spimpi.checks.requests import wait
from spimpi.checks.session import Link, Pair, pair_of
from spimpi.checks.verdict import NO_ELEMENTS, Verdict, Where
from spimpi.errors import IncompleteError, UsageError
from spimpi.fingerprint import fingerprint
from spimpi.fingerprint.protocols import as_array
from spimpi.fingerprint.tag import DEFAULT_SEED, Tag, absorb
from spimpi.trace.schema import Established

NAME = "pipeline hand-off"
WATCHED = "the send buffer was read before the send"
UNWATCHED = "the send buffer was read after the send alone"  # what overwrote it before is not seen


def verify_pipeline_handoff(
    comm, activations, from_rank, to_rank, tag, *, sequence=None, microbatch=None, layers=None,
    where=None, before_send=None, check=True, ctx=None, threads=1,
) -> Verdict:  # fmt: skip
    """Check a hand-off after it: the receiver's buffer, and what both ends say that it is.

    Called by ``from_rank`` and ``to_rank`` alone, each with its own buffer, once its send or
    receive is complete. sequence: number of the hand-off (None: counted for each link and name of
    the tag); layers: (first, last); where: which part of the tensor the buffer is. before_send: of
    the sender, what ``at_rest(activations, tag, where)`` gave before its send began: then a buffer
    that was overwritten before the send had ended is seen. Establishes moved. Collective over the
    two ends, which raise the same errors.
    """
    ends = _ends(comm, from_rank, to_rank)
    pair = pair_of(comm, *ends, ctx)
    name = (tag.seed, tag.name) if isinstance(tag, Tag) else None
    link = pair.links.setdefault((from_rank, name), Link())
    c = _check(activations, tag, where, ends, comm.rank, threads, before_send)
    number = _number(c, "a sequence", sequence, link.sequence)
    words = _words(HANDED_ON, link, c, microbatch, layers, before_send)
    exchange = _Exchange(pair, link, c, ends, comm.rank, words | {"sequence": number})
    link.sequence = number + 1
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
        self._watched: list[AtRest] = []

    @property
    def _pair(self) -> Pair:
        return pair_of(self._comm, *self._ends, self.ctx)

    @property
    def n_handoffs(self) -> int:
        """How many hand-offs this end has made so far."""
        return self._link.sequence

    def before_send(self, activations, *, step=0, layer=-1, where=None) -> None:
        """Fingerprint the buffer of a hand-off to come, on the sender before its send begins. Local.

        The ``verify`` of this very array (its memory), step, layer and ``where`` takes it, the first
        of several alike, and sees a buffer that was overwritten before its send had ended. Not every
        hand-off needs one. On the receiver the next ``verify`` or ``close`` refuses it, at both ends.
        """
        self._require_open()
        tag = Tag(self.seed, self.name, layer, step)
        self._watched.append(at_rest(activations, tag, where, self.threads))

    def verify(
        self, activations, *, step=0, layer=-1, microbatch=None, layers=None, where=None,
        check=True,
    ) -> Verdict:  # fmt: skip
        """Check the next hand-off; arguments and errors as for verify_pipeline_handoff."""
        self._require_open()
        tag = Tag(self.seed, self.name, layer, step)
        before = self._take_watch(activations, tag, where)
        c = _check(activations, tag, where, self._ends, self._comm.rank, self.threads, before)
        words = _words(HANDED_ON, self._link, c, microbatch, layers, before)
        exchange = _Exchange(
            self._pair, self._link, c, self._ends, self._comm.rank, words, self
        )
        self._link.sequence += 1
        return _settled(exchange, check, self.ctx)

    def close(self, *, check=True) -> Verdict:
        """End the chain: both ends must have made as many hand-offs. Collective over the two."""
        self._require_open()
        c = Check(NAME, Tag(self.seed, self.name), Rule.LOCAL, Established.MOVED)
        if self._watched:
            c.error = _never_handed_on(self._watched)
            self._watched = []
        words = _words(CLOSED, self._link, c, None, None)
        exchange = _Exchange(
            self._pair, self._link, c, self._ends, self._comm.rank, words, self
        )
        return _settled(exchange, check, self.ctx)

    def _take_watch(self, activations, tag, where) -> AtRest | None:
        """The watch of this hand-off's array, no longer kept; None where it was not watched.

        One of the same memory and another place is a mistake, which the check refuses; one of other
        memory is another hand-off's.
        """
        if not self._watched:
            return None
        try:
            array = as_array(activations)
            place = tag, place_of(array.shape, where)
        except Exception:  # the check meets it again, and tells both ends
            return None
        its_own = [w for w in self._watched if _same_array(w.array, array)]
        right = [w for w in its_own if (w.tag, w.slab) == place]
        found = next(iter(right or its_own), None)
        if found is not None:
            self._watched.remove(found)
        return found

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


def _check(array, tag, where, ends, rank, threads, before) -> Check:
    c = Check(NAME, tag, Rule.MOVED, Established.MOVED, threads)

    def build(c):
        slab = (c.gives if rank == ends[0] else c.gets)(array, where)
        if before is not None:
            _require_watch(before, c, slab, rank == ends[0])

    return built(c, build)


def _require_watch(before, c: Check, slab, sends) -> None:
    """UsageError unless ``before`` is a watch of this hand-off's buffer."""
    if not sends:
        msg = "before_send is for the sender, found one on the receiver"
        raise UsageError(msg)
    if not isinstance(before, AtRest):
        msg = f"before_send is what spimpi.at_rest gave, found {type(before).__name__}"
        raise UsageError(msg)
    (array, _), watched = c.contributed[0], before.array
    if (before.tag, before.slab) != (c.tag, slab) or watched.dtype != array.dtype:
        msg = (
            f"before_send is of another tensor: {before.tag} at {before.slab}, and the hand-off is "
            f"of {c.tag} at {slab}"
        )
        raise UsageError(msg)
    if not _same_array(watched, array):
        msg = "before_send is of another array: give at_rest the buffer that is sent, and its check too"
        raise UsageError(msg)


def _same_array(a, b) -> bool:
    """Whether two arrays are the same memory, seen alike. Empty ones of one shape always are."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    steps = [[s for s, n in zip(x.strides, x.shape) if n > 1] for x in (a, b)]
    return not a.size or (a.ctypes.data == b.ctypes.data and steps[0] == steps[1])


def _never_handed_on(watches) -> UsageError:
    """What a chain's end says of watches that no hand-off took."""
    places = [f"{w.tag} at {w.slab}" for w in watches[:3]]
    more = ", …" * (len(watches) > 3)
    return UsageError(
        f"{len(watches)} before_send of no hand-off: {', '.join(places)}{more}; give `verify` the "
        "same array, step, layer and where"
    )


def _words(kind, link, c: Check, microbatch, layers, before=None) -> dict:
    """What this end says of the hand-off; an error of this end is kept in the check."""
    words = {"kind": kind, "sequence": link.sequence, "running": link.running}
    blocks = c.contributed or c.held
    try:
        words["microbatch"] = _number(c, "a microbatch", microbatch)
        first, last = layers if layers is not None else (None, None)
        words["first_layer"] = _number(c, "a layer", first)
        words["last_layer"] = _number(c, "a layer", last)
        if blocks:
            array, slab = blocks[0]
            words["dims"], words["n_dims"] = dims_of(array.shape), array.ndim
            words["dtype"] = array.dtype.name.encode()[:16]
            words["place"] = _digest(repr(slab))
    except UsageError as error:
        c.error = c.error or error
    except (TypeError, ValueError):
        c.error = c.error or UsageError(f"layers are (first, last), found {layers!r}")
    if isinstance(c.tag, Tag):
        words |= {"step": c.tag.step, "layer": c.tag.layer, "seed": c.tag.seed}
        words["name"] = _digest(c.tag.name)
    words["fingerprint"] = words["now"] = c.given ^ c.got
    words["error"] = c.error is not None
    if before is not None and c.error is None:
        words["watched"], words["fingerprint"] = 1, before.fingerprint
    return words


def _number(c: Check, what, value, otherwise=NOT_GIVEN) -> int:
    """A number that the ends tell each other; for None, and for what is none, ``otherwise``.

    The error is kept in the check: the other end is told, and does not wait."""
    if value is None:
        return otherwise
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or not -(2**63) < number < 2**63:
        c.error = c.error or UsageError(f"{what} is an integer of 64 bits, found {value!r}")
        return otherwise
    return number


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _settled(exchange, check, ctx):
    if ctx is not None:
        exchange.check.tracer, exchange.attendance = ctx.tracer, ctx.attendance
    if ctx is not None and ctx.open_batch is not None:
        return ctx.open_batch.add_handoff(exchange, check)
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
        self.before = link.sequence  # the link's number where this hand-off does not count
        # The two directions between two ranks do not wait for each other, and what was under way in
        # a batch that a rank has left meets nothing. (MPI has tags up to 32767 at least.)
        tag = 2 * (pair.n_left % (1 << 14)) + int(ends[0] > ends[1])
        self.requests = [
            pair.comm.Irecv([self.other.view(np.uint8), MPI.BYTE], self.peer, tag),
            pair.comm.Isend([self.own.view(np.uint8), MPI.BYTE], self.peer, tag),
        ]

    @property
    def order(self) -> tuple:
        """Where this hand-off comes when many are finished: all ranks must have one order."""
        return min(self.ends), max(self.ends), self.ends[0]

    def take_back(self) -> None:
        """It does not count, though it stays under way, and with it its buffers. Local."""
        self.link.sequence = self.before
        self.pair.abandoned.append(self)

    def finish(self) -> Verdict:
        """Wait for the other end's record, and judge. The same on both ends."""
        try:
            for request in self.requests:
                wait(request, None, self.attendance, in_words([self.check]), self.pair)
        except IncompleteError:
            self.take_back()
            raise
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
            verdict = self._failed(sent, waited, None, problem)
        elif sent["fingerprint"] != waited["fingerprint"]:
            verdict = self._other_content(sent, waited)
        else:
            verdict = self._holding(word, closing, bool(sent["watched"]))
        if not closing and not problem:
            array, slab = (self.check.contributed or self.check.held)[0]
            self.link.n_filled += array.size > 0
            self.link.history.append((int(sent["sequence"]), self.check.tag, slab, word))
        if self.check.tracer is not None:
            self.check.tracer.record(
                self.check, verdict, self.pair.comm, self.peer, sequence=self.own["sequence"][0],
                microbatch=max(int(self.own["microbatch"][0]), -1),
            )  # fmt: skip
        return verdict

    def _holding(self, word, closing, watched) -> Verdict:
        """The verdict of a hand-off, or of a whole chain, in which nothing is wrong."""
        if closing:
            some, strength = self.link.n_filled > 0, ""
            none = "no hand-off was made: nothing was compared"
            nothing = NO_ELEMENTS if self.link.sequence else none
        else:
            array, _ = (self.check.contributed or self.check.held)[0]
            some, nothing = array.size > 0, NO_ELEMENTS
            strength = WATCHED if watched else UNWATCHED
        return Verdict(
            True, Established.MOVED if some else Established(0), check=NAME, expected=word,
            actual=word, missing=() if some else (nothing,), strength=strength,
        )  # fmt: skip

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
            self.link.sequence = self.before  # at both ends
            msg = f"hand-off from rank {self.ends[0]} to rank {self.ends[1]}: {problem}"
            raise UsageError(msg) from self.check.error

    def _other_content(self, sent, waited) -> Verdict:
        """What the receiver holds instead. Collective over the two ends."""
        c, comm, alone = self.check, self.pair.comm, self.pair.alone
        reused = not c.same_as_then()
        stale = self._earlier() if c.held and not reused else None
        mine = stale, reused, MPI.Get_processor_name()
        theirs = comm.sendrecv(mine, dest=self.peer, source=self.peer)
        both = [mine, theirs][:: 1 if self.rank == self.ends[0] else -1]
        stale = both[1][0]
        overwritten = sent["watched"] and sent["now"] != sent["fingerprint"]
        reused = [end for end, (_, reused, _) in zip(self.ends, both) if reused]
        found, details = None, [stale] if stale else []
        if reused:
            details.append(f"{used_again(reused)}: which elements were wrong is not known")
        elif not overwritten:
            history = {(tag, slab): word for _, tag, slab, word in self.link.history}
            found = findings(alone, c, None, history)
            details.append(found.text)
        rank, why = self._blamed(sent, waited, stale, overwritten)
        text = "; ".join([*details, why])
        if found is not None:
            elements = tuple(replace(e, rank=self.ends[1]) for e in found.elements)
            found = replace(found, elements=elements)
        host = "" if rank is None else both[self.ends.index(rank)][2]
        return self._failed(sent, waited, rank, text, host, found)

    def _blamed(self, sent, waited, stale, overwritten) -> tuple[int | None, str]:
        """(the rank at fault, who may be in words). A send buffer that is what it was before its
        send leaves the receiver; one that is now what was received was overwritten too early."""
        sender, receiver = self.ends
        if stale:
            return receiver, f"received from rank {sender}"
        if overwritten and sent["now"] == waited["fingerprint"]:
            return sender, (
                f"the send buffer of rank {sender} was overwritten before its send had ended: rank "
                f"{receiver} received what it holds now"
            )
        if overwritten:
            return None, (
                f"received from rank {sender}, whose send buffer has changed since it was "
                f"fingerprinted before the send: it was overwritten while it was sent, or rank "
                f"{receiver} received other data, and nothing tells which"
            )
        if sent["watched"]:
            return receiver, f"received from rank {sender}, whose send buffer is as it was"
        return None, (
            f"received from rank {sender}: rank {receiver} received other data, or the send buffer "
            f"of rank {sender} has changed since, and nothing tells which"
        )

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

    def _failed(self, sent, waited, rank, detail, host="", found=None) -> Verdict:
        tag = self.check.tag
        words = [int(r["fingerprint"]) for r in (sent, waited)]
        microbatch = int(waited["microbatch"])
        where = Where(
            NAME, tag.name, tag.step, tag.layer, max(microbatch, -1), rank, host, self.ends[1],
            *(f"{w:016x}" for w in words), detail, elements=found.elements if found else (),
            n_wrong=found.n_wrong if found else None,
        )  # fmt: skip
        return Verdict(
            False, Established(0), where, check=NAME, expected=words[0], actual=words[1]
        )
