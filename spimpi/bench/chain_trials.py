"""Trials of ``HandoffChain``, as in moved_trials.py: three hand-offs and the end of the chain."""

import spimpi
from spimpi.bench.scenes import LOST, MIXED, RECORD, REORDERED, TWICE, Scene

N_HANDOFFS = 3


def chain(s: Scene):
    """One hand-off of the three is hit; of a fault of the sequence, the order that buffers came in.

    The chain holds where all its hand-offs and its end do.
    """
    ends = tuple(int(r) for r in s.rng.choice(s.n, 2, replace=False))
    at = int(s.rng.integers(N_HANDOFFS))
    sent = [s.earlier[s.rows], s.whole[s.rows], s.whole[::-1][s.rows]]
    sent[1], sent[at] = sent[at], sent[1]
    received = list(sent)
    received[at] = s.wrong_shard()
    other = (at + 1) % N_HANDOFFS
    if s.fault == LOST:
        del received[at]
    elif s.fault == TWICE:
        received.insert(at, sent[at])
    elif s.fault == REORDERED:
        received[at], received[other] = received[other], received[at]
    # Of two chains the first two hand-offs change places; the third is then as it should be.
    own, mixed = ((0, 1, 0), (1, 0, 0)) if s.fault == MIXED else ((0,) * 4,) * 2
    hit = ({"microbatch": s.hit + 1}, {"layers": (8, 15)})[int(s.rng.integers(2))]
    s.rounds = len(received) + 3

    def call(comm, ctx):
        receives = comm.rank == ends[1]
        chains = [spimpi.HandoffChain(comm, *ends, "hidden", ctx=ctx) for _ in range(2)]
        held = True
        for i, buffer in enumerate(received if receives else sent):
            told = {"microbatch": s.hit, "layers": (0, 7)}
            if receives and s.fault == RECORD and i == at:
                told |= hit
            one = chains[(mixed if receives else own)[i]]
            held &= bool(one.verify(buffer, step=i, where=s.parts[s.hit], check=False, **told))
        if not chains[0].closed:
            held &= bool(chains[0].close(check=False))
        return held

    return call, ends
