"""What the checks write down: words, records, events, the golden table, the conclusion."""

import numpy as np

from spimpi.bench.runtime_faults.fault import Fault, after, before, given, zeros

RECORDER, RUN = "spimpi.checks.recorder:Recorder", "spimpi.verification.run:_Run"
GOLDEN, LEDGER = "spimpi.inference.golden", "spimpi.inference.ledger:Ledger"
EVENTS, WORDS, TABLE = "events", "words of the checks", "the golden table"


def _without_the_last(events, rng):
    return events[:-1]


def _with_the_last_twice(events, rng):
    return np.concatenate([events, events[-1:]])


def _lost(call, hand):
    hand.struck = True


def _twice(call, hand):
    call.proceed()
    call.proceed()
    hand.struck = True


def _word(name):
    def strike(call, hand):
        hand.edit(call.owner._layers[name][: call.owner.n_slots])
        call.proceed()

    return strike


def _merged_zeros(call, hand):
    call.proceed()
    if call.owner.merged is not None:
        hand.edit(call.owner.merged.reshape(-1)[:1], zeros)


def _merged(name):
    def strike(call, hand):
        call.proceed()
        if call.owner.merged is not None:
            hand.edit(call.owner.merged[name])

    return strike


def on_rank_0(call):
    return call.owner.ctx.rank == 0


def has_golden(call):
    return call.owner.has_golden


def many(mode):
    return mode.grid.tp > 1


ANY = ("hidden", "embed", "qkv", "attn", "resid", "ffn", "attn_out", "ffn_out", "scores", "gate_up",
       "attn_max", "ffn_max", "qk_max", "qk_sum", "qk_normed")  # fmt: skip

FAULTS = (
    Fault("an event lost on its way", EVENTS, f"{RECORDER}.add", given("events", _without_the_last),
          harmless=True),
    Fault("an event counted twice", EVENTS, f"{RECORDER}.add",
          given("events", _with_the_last_twice), harmless=True),
    Fault("a group's events lost", EVENTS, f"{RECORDER}.add", _lost, harmless=True),
    Fault("a group's events twice", EVENTS, f"{RECORDER}.add", _twice, harmless=True),
    Fault("a single event lost", EVENTS, f"{RECORDER}.one", _lost, harmless=True),
    Fault("a single event twice", EVENTS, f"{RECORDER}.one", _twice, harmless=True),
    *(Fault(f"the word of {words}", WORDS, f"{LEDGER}.start", _word(name), ANY, harmless=True)
      for name, words in (("rest_expected", "a tensor as it was made"),
                          ("rest_found", "a tensor after its last use"),
                          ("segments", "a part of qkv"), ("hidden", "a layer's output"))),
    # On one rank alone such a fault leaves that rank waiting for the others, until the watchdog ends
    # the job (docs/what-pass-means.md).
    *(Fault(f"the field {name} of a merged record, alike on all tensor ranks", WORDS,
            f"{LEDGER}.finish", _merged(name), ANY, fits=many, harmless=True, alike=True)
      for name in ("total", "every", "none", "count")),
    Fault("a merged record of zeros, alike on all tensor ranks", WORDS, f"{LEDGER}.finish",
          _merged_zeros, ANY, fits=many, harmless=True, alike=True),
    Fault("this rank's share of the golden table", TABLE, f"{GOLDEN}:global_table",
          before("table"), ANY + ("logits", "tokens"), harmless=True),
    Fault("the run's golden table", TABLE, f"{GOLDEN}:global_table", after("result"),
          ANY + ("logits", "tokens"), lambda call: call["comm"].rank == 0, harmless=True),
)  # fmt: skip
