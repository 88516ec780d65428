"""Listeners that every trial has: where the run stands, and what logits it computed."""

import numpy as np

STAGE, HEAD = "spimpi.inference.model:Stage", "spimpi.inference.head:Head"
FORWARD = "spimpi.inference.layers:Layers.forward"


def clock(now) -> dict:
    """Listeners that keep ``now`` right."""

    def begins(part):
        def listen(call):
            before, now.part = now.part, part
            call.proceed()
            now.part = before

        return listen

    def step(call):
        now.stage, now.part, now.step = call.owner, "step", call["step"]
        now.layer = now.microbatch = -1
        call.proceed()

    def batch(call):
        now.microbatch = call["m"]
        call.proceed()

    def forward(call):
        now.layer = call.owner.ctx.layers[call["i"]]
        now.part = "layer"
        call.proceed()
        now.layer, now.part = -1, "step"

    def inference(call):
        now.part = "inference"
        call.proceed()
        now.part, now.step, now.layer, now.microbatch = "end", -1, -1, -1

    run = "spimpi.verification.run:_Run"
    return {
        f"{run}.weights": begins("weights"), f"{STAGE}.run": inference, f"{STAGE}.step": step,
        f"{STAGE}._batch": batch, FORWARD: forward, f"{HEAD}.sample": begins("head"),
        f"{STAGE}._close_group": begins("comparing"),
    }  # fmt: skip


class Logits:
    """What this rank's head computed and gathered, step by step."""

    def __init__(self):
        self.seen = []

    def listen(self, call):
        call.proceed()
        head = call.owner
        whole = head.gathered if head.gathered.size else head.logits
        self.seen.append((np.array(head.logits), np.array(whole)))

    def same_as(self, other) -> bool:
        """Whether those of another run have the same bits."""
        return [tuple(a.tobytes() for a in pair) for pair in self.seen] == [
            tuple(a.tobytes() for a in pair) for pair in other.seen
        ]
