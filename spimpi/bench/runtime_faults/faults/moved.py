"""What crosses between ranks outside the tensor group: hand-offs, keys and values, last rows."""

import numpy as np

from spimpi.bench.runtime_faults.fault import Fault, after, before, swapped_rows

HANDOFF, LINKS, SEQUENCE = (
    f"spimpi.{place}" for place in
    ("checks.handoff", "inference.links:Links", "inference.sequence:SequenceGroup")
)
HANDED, GATHERED = "hand-offs", "gathers of keys, values and last rows"


def pipeline(mode):
    return mode.grid.pp > 1


def sequence(mode):
    return mode.grid.sp > 1


def of_hidden(call):
    """Hand-offs of hidden rows, not of tokens."""
    return call.owner.slots[0].buffer.dtype == np.float32


def of_tokens(call):
    return not of_hidden(call)


def _slot(call):
    slot = call.owner.slots[call.owner.turn]
    return slot.buffer[: slot.rows]


def _last_sent(call):
    slot = call.owner.slots[call.owner.turn - 1]
    return slot.buffer[: slot.rows]


def field(name):
    """A field of the record that was received, one larger."""

    def strike(call, hand):
        _, record = call.proceed()
        hand.edit(call.owner.slots[(call.owner.taken - 1) % 2].record,
                  lambda r, rng: r.__setitem__(name, r[name] + np.array(1, r.dtype[name])))

    return strike


def _arrived(call, hand):
    buffer, _ = call.proceed()
    hand.edit(buffer)


def _arrived_exchanged(call, hand):
    buffer, _ = call.proceed()
    hand.edit(buffer, swapped_rows)


def _arrived_stale(call, hand):
    """The other buffer's contents: those of another microbatch."""
    buffer, _ = call.proceed()
    other = call.owner.slots[call.owner.taken % 2].buffer[: len(buffer)]
    hand.edit(buffer, lambda a, rng: a.__setitem__(slice(None), other))


def _sent_wrong(call, hand):
    """Another piece is sent than was taken down."""
    sent = np.array(call[0])
    hand.edit(sent)
    call[0] = sent
    call.proceed()


def in_layers(call):
    return call.now.part == "layer" and call.now.step >= 0


def of_last_rows(call):
    return call.now.part == "step" and call.now.step == 0


def _of_gathered(name):
    """A row of the gathered ones at another position or of another prompt."""

    def strike(call, hand):
        call.proceed()
        gathered = call["batch"].gathered
        array = np.array(getattr(gathered, name))
        if len(array) > 1:
            array[[0, -1]] = array[[-1, 0]]
        object.__setattr__(gathered, name, hand.swapped_for(getattr(gathered, name), array))

    return strike


FAULTS = (
    Fault("hidden rows in the sender's buffer", HANDED, f"{HANDOFF}:Sender.send", before(_slot),
          ("hidden",), of_hidden, fits=pipeline),
    Fault("hidden rows in the sender's buffer, while they are sent", HANDED,
          f"{HANDOFF}:Sender.drain",
          before(_last_sent), ("hidden",), of_hidden, fits=pipeline),
    Fault("hidden rows as they arrived", HANDED, f"{HANDOFF}:Receiver.take", _arrived, ("hidden",),
          of_hidden, fits=pipeline),
    Fault("two hidden rows exchanged on the way", HANDED, f"{HANDOFF}:Receiver.take",
          _arrived_exchanged, ("hidden",), of_hidden, fits=pipeline),
    Fault("another microbatch's rows arrived", HANDED, f"{HANDOFF}:Receiver.take", _arrived_stale,
          ("hidden",), of_hidden, fits=pipeline),
    Fault("received rows after they were checked", HANDED, f"{LINKS}.receive", after("result"),
          ("hidden",), fits=pipeline),
    *(Fault(f"the record's {name}", HANDED, f"{HANDOFF}:Receiver.take", field(name), ("hidden",),
            of_hidden, fits=pipeline, harmless=True)
      for name in ("sequence", "step", "microbatch", "first_layer", "last_layer", "first_row",
                   "n_rows", "n_cols", "itemsize", "fingerprint")),
    Fault("tokens as they arrived", HANDED, f"{HANDOFF}:Receiver.take", _arrived, ("tokens",),
          of_tokens, fits=pipeline),
    Fault("tokens in the sender's buffer", HANDED, f"{HANDOFF}:Sender.send", before(_slot),
          ("tokens",), of_tokens, fits=pipeline),
    Fault("gathered keys and values", GATHERED, f"{SEQUENCE}.gather", after("result"), ("kv",),
          fits=sequence),
    Fault("two gathered rows of keys and values exchanged", GATHERED, f"{SEQUENCE}.gather",
          after("result", how=swapped_rows), ("kv",), fits=sequence),
    Fault("keys and values as they are sent", GATHERED, "sequence.Allgatherv", _sent_wrong, ("kv",),
          in_layers, fits=sequence),
    Fault("last rows as they are sent", GATHERED, "sequence.Allgatherv", _sent_wrong,
          ("last_rows",), of_last_rows, fits=sequence),
    Fault("gathered last rows", GATHERED, "sequence.Allgatherv",
          after(lambda call: call[1][0]), ("last_rows",), of_last_rows, fits=sequence),
    Fault("last rows as the head gets them", GATHERED, f"{SEQUENCE}.gather_last", after("out"),
          ("last_rows", "logits"), fits=sequence),
    Fault("last rows exchanged as the head gets them", GATHERED, f"{SEQUENCE}.gather_last",
          after("out", how=swapped_rows), ("last_rows", "logits"), fits=sequence),
    Fault("positions of gathered rows", GATHERED, f"{SEQUENCE}.gather", _of_gathered("positions"),
          ("scores", "attn", "kv"), fits=sequence,
          only=lambda call: call["batch"].gathered.positions.size > 1),
)  # fmt: skip
