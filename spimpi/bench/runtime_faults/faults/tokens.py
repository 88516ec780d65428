"""Token ids: prompts, choice, the way back to the embedding, the way out; the head that chooses."""

import numpy as np

from spimpi.bench.runtime_faults.fault import (
    SCALED_BACK, Fault, after, alike, another_id, before, given, larger_maximum, plus_one, returned,
    swapped_rows,
)  # fmt: skip
from spimpi.bench.runtime_faults.faults.layers import scaled_back_from

STAGE, HEAD, LINKS = (
    f"spimpi.inference.{place}" for place in ("model:Stage", "head:Head", "links:Links")
)
RUN, ANSWER = "spimpi.verification.run:_Run", "spimpi.verification.answer:Answer"
TOKENS, PROMPTS, WAY, HEADS = (
    "the choice of tokens", "prompt ids", "tokens after they were chosen", "the head"
)  # fmt: skip


def _edited(array, rng, how):
    array = np.array(array)
    how(array, rng)
    return array


def changed(how):
    """For ``returned`` and ``given``: a changed copy, where there is an array."""
    return lambda array, rng: None if array is None else _edited(array, rng, how)


def _second_best(call, hand):
    """The runner-up is chosen, of one prompt."""
    best = call.proceed()
    whole = np.concatenate(call[0], axis=1)
    at = int(hand.rng.integers(len(best)))
    call.result = np.array(best)
    call.result[at] = np.argsort(whole[at])[-2]
    call.result = hand.swapped_for(best, call.result)


def _exchanged_prompts(prompts, rng):
    """Two prompts of one length in each other's place."""
    prompts = list(prompts)
    lengths = [len(p) for p in prompts]
    pairs = [(i, j) for i in range(len(prompts)) for j in range(i) if lengths[i] == lengths[j]]
    if pairs:
        i, j = pairs[int(rng.integers(len(pairs)))]
        prompts[i], prompts[j] = prompts[j], prompts[i]
    return prompts


def _another_id_of_a_prompt(prompts, rng):
    prompts = [np.array(p) for p in prompts]
    another_id(prompts[int(rng.integers(len(prompts)))], rng)
    return prompts


def first_stage(call):
    return call.owner.ctx.is_first_stage


def last_stage(call):
    return call.owner.ctx.is_last_stage


def gives_tokens(call):
    """Ranks whose run gives tokens."""
    return first_stage(call) or last_stage(call)


def in_head(call):
    return call.now.part == "head"


def _stale_tokens(call, hand):
    """Tokens of a finished step change after they have been embedded."""
    call.proceed()
    hand.edit(call["tokens"], another_id)


# In exo's ring and pipelines the last stage chooses and the first embeds.
_PROMPT_IDS = Fault(
    "one id of a prompt, before it is embedded", PROMPTS, f"{STAGE}.own_tokens",
    returned(changed(another_id)), ("prompts", "embed"), first_stage,
)  # fmt: skip
_EMBEDDED = Fault(
    "the ids that a microbatch embeds", WAY, "spimpi.inference.model:embed",
    given("ids", changed(another_id)), ("embed", "tokens"), later=True,
    only=lambda call: call.now.step > 0,
)  # fmt: skip
_ARGMAX = Fault(
    "argmax gives another id", TOKENS, "spimpi.inference.head:argmax",
    returned(changed(another_id)), ("tokens",),
)  # fmt: skip
_SECOND = Fault(
    "argmax gives the runner-up", TOKENS, "spimpi.inference.head:argmax", _second_best, ("tokens",)
)
_HANDED = Fault(
    "the ids that a step gives back", WAY, f"{STAGE}.step", returned(changed(another_id)),
    ("tokens", "embed"), gives_tokens, later=True,
)  # fmt: skip
_ROWS_SWAPPED = Fault(
    "two prompts' rows exchanged in the head", HEADS, f"{HEAD}.sample",
    before(lambda call: call.owner.rows, how=swapped_rows), ("last_rows", "logits", "hidden"),
)  # fmt: skip
_ROWS = Fault(
    "an element of the head's rows", HEADS, f"{HEAD}.sample",
    before(lambda call: call.owner.rows), ("last_rows", "logits", "hidden"),
)  # fmt: skip
_LAST_NORMED = Fault(
    "the last norm's output", HEADS, "spimpi.inference.kernels:rmsnorm", after("out"), ("logits",),
    in_head,
)  # fmt: skip
_LAST_NORM = Fault(
    "the last norm's weights in memory", HEADS, "spimpi.inference.kernels:rmsnorm",
    before("weight"), ("logits", "weights"), in_head,
)  # fmt: skip
_HEAD_MAXIMA = Fault(
    "row maxima in the head", HEADS, "spimpi.inference.exact:row_absmax",
    after("out", how=larger_maximum), ("logits",), in_head,
)  # fmt: skip
_HEAD_SCALED = Fault(
    "scaled inputs of the head", HEADS, "spimpi.inference.exact:quantize_rows", after("out"),
    ("logits",), in_head,
)  # fmt: skip
_HEAD_EXPONENTS = Fault(
    "exponents of the head's input rows", HEADS, "spimpi.inference.exact:quantize_rows",
    after("exps", how=plus_one), ("logits",), in_head,
)  # fmt: skip


def _one_row_earlier(call, hand):
    """A prompt's last row but one is taken for its last."""
    last = np.array(call["last"])
    starts = last > call["batch"].first_row
    if starts.any():
        at = hand.rng.choice(np.flatnonzero(starts))
        last[at] -= 1
        call["last"] = hand.swapped_for(call["last"], last)
    call.proceed()


FAULTS = (
    Fault("one id of a prompt, as the run is given it", PROMPTS, f"{STAGE}.run",
          given("prompts", _another_id_of_a_prompt), ("prompts", "embed"), first_stage),
    Fault("two prompts exchanged", PROMPTS, f"{STAGE}.run", given("prompts", _exchanged_prompts),
          ("prompts", "embed"), first_stage),
    _PROMPT_IDS, alike(_PROMPT_IDS),
    _EMBEDDED, alike(_EMBEDDED),
    _ARGMAX, alike(_ARGMAX),
    _SECOND, alike(_SECOND),
    _HANDED, alike(_HANDED),
    Fault("the ids that argmax gave, before they are handed on", WAY, f"{LINKS}.hand_on_tokens",
          before("chosen", how=another_id), ("tokens",), later=True),
    Fault("the ids that came round the ring", WAY, f"{LINKS}.receive_tokens",
          returned(changed(another_id)), ("tokens", "embed"), later=True,
          fits=lambda mode: mode.grid.pp > 1),
    Fault("a finished step's ids, later", WAY, f"{STAGE}.step", _stale_tokens, ("tokens",),
          only=lambda call: call["step"] > 0 and gives_tokens(call), later=True),
    Fault("the tokens that the run gives back", WAY, f"{STAGE}.run", returned(changed(another_id)),
          ("tokens",), only=lambda call: gives_tokens(call) and call.owner.ctx.rank == 0),
    Fault("the tokens that the run gives back, on another rank", WAY, f"{STAGE}.run",
          returned(changed(another_id)), ("tokens",), only=first_stage,
          fits=lambda mode: mode.grid.dp * mode.grid.sp > 1),
    Fault("the gathered tokens", WAY, f"{ANSWER}._over",
          returned(changed(another_id)), ("tokens",), fits=lambda mode: mode.grid.dp * mode.grid.sp > 1,
          only=lambda call: call.owner.ctx.rank == 0),
    Fault("gathered tokens, as they are sent", WAY, f"{ANSWER}._over",
          given("tokens", changed(another_id)), ("tokens",),
          fits=lambda mode: mode.grid.dp * mode.grid.sp > 1),
    Fault("the tokens after all gathers", WAY, f"{ANSWER}.handed_out",
          returned(changed(another_id)), ("tokens",), only=lambda call: call.owner.ctx.rank == 0),
    Fault("the tokens after the verdict, before they are printed", WAY,
          "spimpi.bench.runtime_faults.trial:verify_distributed_inference",
          after(lambda call: call.result.tokens, how=another_id), ("tokens",),
          only=lambda call: call["comm"].rank == 0),
    Fault("the tokens as the verdict is made", WAY, f"{RUN}._conclude",
          given("tokens", changed(another_id)), ("tokens",),
          only=lambda call: call.owner.ctx.rank == 0),
    _ROWS_SWAPPED, alike(_ROWS_SWAPPED), _ROWS, alike(_ROWS),
    Fault("a prompt's last row but one goes to the head", HEADS, f"{HEAD}.take", _one_row_earlier,
          ("last_rows", "logits", "hidden"), fits=lambda mode: mode.grid.sp == 1),
    _LAST_NORMED, alike(_LAST_NORMED), _LAST_NORM, alike(_LAST_NORM),
    _HEAD_MAXIMA, alike(_HEAD_MAXIMA), _HEAD_SCALED, alike(_HEAD_SCALED),
    _HEAD_EXPONENTS, alike(_HEAD_EXPONENTS),
    Fault("the head's exponents in memory", HEADS, f"{HEAD}.sample",
          before(lambda call: call.owner.facts.part.head.exponents, how=plus_one),
          ("logits", "weights"),
          fits=lambda mode: mode.exact),
    Fault("the head's integers in memory", HEADS, f"{HEAD}.sample",
          before(lambda call: call.owner.facts.part.head.values), ("logits",),
          fits=lambda mode: mode.exact),
    Fault("the head's product", HEADS, "spimpi.inference.exact:matmul", after("out"), ("logits",),
          in_head),
    Fault("the head's product, before it is scaled back", HEADS,
          "spimpi.inference.product:finish_projection", scaled_back_from, ("logits",), in_head,
          why=SCALED_BACK),
    Fault("logits in memory", HEADS, "spimpi.inference.product:finish_projection", after("out"),
          ("logits",), in_head),
    Fault("logits as gathered, on one rank", HEADS, "tensor.Allgatherv",
          after(lambda call: call[1][0]), ("logits", "tokens"), in_head,
          fits=lambda mode: mode.grid.tp > 1),
    Fault("logits as gathered, alike on all tensor ranks", HEADS, "tensor.Allgatherv",
          after(lambda call: call[1][0]), ("logits",), in_head, alike=True,
          fits=lambda mode: mode.grid.tp > 1),
)  # fmt: skip
