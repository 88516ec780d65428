"""Attention: rotary embedding, the cache of keys and values, OLMo's norm of queries and keys."""

import numpy as np

from spimpi.bench.runtime_faults.fault import (
    IN_ATTENTION, Fault, after, alike, before, larger_maximum, nudge, plus_one,
)  # fmt: skip

LAYERS = "spimpi.inference.layers"
ATTEND, QK = f"{LAYERS}:attend", "spimpi.inference.qk_norm"
ROPE, CACHE, ATTENTION, QK_NORM = (
    "rotary tables and positions", "the cache of keys and values", "inside attention",
    "the norm of queries and keys",
)  # fmt: skip


def exact_olmo(mode):
    return mode.exact and mode.olmo


def held(call):
    """(sequence, key/value head, position) of one entry that the last row of the call will see."""
    sequences, positions = call["sequences"], call["positions"]
    return int(sequences[-1]), int(positions[-1])


def has_rows(call):
    return len(call["sequences"]) > 0 and call["qkv"].shape[0] > 0


def has_past(call):
    """Calls whose last row has keys of earlier steps behind it."""
    return call.now.step > 0 and has_rows(call)


def past_entry(name, how=nudge):
    """Change what the cache holds of an earlier position that the rows of this call see."""

    def strike(call, hand):
        sequence, position = held(call)
        array = call[name]
        head = int(hand.rng.integers(array.shape[1]))
        if name == "key_sums":
            hand.edit(array[sequence, head], how)
        else:
            at = position - 1  # within any window
            hand.edit(array[sequence, head, at : at + 1], how)
        call.proceed()

    return strike


def _swap(hand, array, i, j):
    before = array[i].copy()
    hand.edit(array, lambda a, rng: (a.__setitem__(i, a[j]), a.__setitem__(j, before)))


def heads_with_sums(kind):
    """Two key/value heads of one sequence in each other's place, with all that their checks know."""
    names = ("keys", "key_exponents", "key_sums") if kind == "keys" else (
        "values", "value_exponents", "value_sums")

    def strike(call, hand):
        sequence, _ = held(call)
        for name in names:
            if call[name].shape[1] > 1:
                _swap(hand, call[name][sequence], 0, 1)
        call.proceed()

    return strike


def positions_with_sums(kind):
    """Two positions of one head exchanged, with what is kept of each of them."""

    def strike(call, hand):
        sequence, position = held(call)
        names = (kind, f"{kind[:-1]}_exponents") + (("value_sums",) if kind == "values" else ())
        for name in names:
            _swap(hand, call[name][sequence, 0], position - 1, position - 2)
        call.proceed()

    return strike


OF_HEADS = ("keys", "key_exponents", "key_sums", "values", "value_exponents", "value_sums", "seals")


def whole_heads(call, hand):
    """Two key/value heads of one sequence in each other's place, with all that is kept of them."""
    sequence, _ = held(call)
    for name in OF_HEADS:
        if call[name].shape[1] > 1:
            _swap(hand, call[name][sequence], 0, 1)
    call.proceed()


def sequences_exchanged(call, hand):
    """The caches of two prompts of which both have the same number of keys."""
    sequence, _ = held(call)
    other = 0 if sequence else 1
    if call["keys"].shape[0] > 1:
        for name in OF_HEADS:
            array = call[name]
            before = array[sequence].copy()
            hand.edit(array, lambda a, rng, b=before: (
                a.__setitem__(sequence, a[other]), a.__setitem__(other, b)))  # fmt: skip
    call.proceed()


def other_index(name, limit):
    """An index of a row (its sequence, its position, its head) another valid one, in this call."""

    def strike(call, hand):
        own = np.array(call[name])
        n = limit(call)
        at = int(hand.rng.integers(len(own)))
        if n > 1:
            own[at] = (own[at] - 1) % n
        call[name] = hand.swapped_for(call[name], own)
        call.proceed()

    return strike


def _inside(change):
    """What attend computes from changed queries, keys or values, with the fingerprints of the right
    ones: as if they changed between their last word and their use."""

    def strike(call, hand):
        from spimpi.inference.kernels import fingerprint_segments

        qkv = call["qkv"]
        right = qkv.copy()
        change(call, qkv, hand)
        call.proceed()
        qkv[...] = right
        words = np.zeros(len(call["segments"]), np.uint64)
        settings = call["settings"]
        fingerprint_segments(
            qkv.view(np.uint32), call["step_keys"][call["layer"] + 1], int(settings[8]),
            call["first_row"], call["segments"], int(settings[5]), words, 0,
        )  # fmt: skip
        call["segments_found"][call["layer"]] = words

    return strike


def _part_of_qkv(which):
    def change(call, qkv, hand):
        head_dim, n_kv = int(call["settings"][0]), int(call["settings"][1])
        n_q = call["kv_of_head"].shape[0] * head_dim
        width = n_kv * head_dim
        start, stop = {"queries": (0, n_q), "keys": (n_q, n_q + width),
                       "values": (n_q + width, n_q + 2 * width)}[which]  # fmt: skip
        hand.edit(qkv[:, start:stop])

    return change


def _output_before_its_word(call, hand):
    """What attention gives, changed before it is fingerprinted: softmax or weights went wrong."""
    from spimpi.inference.attention import REST_ATTN
    from spimpi.inference.kernels import fingerprint_block
    from spimpi.inference.tensors import ATTN

    call.proceed()
    hand.edit(call["out"])
    words, settings = np.zeros(1, np.uint64), call["settings"]
    fingerprint_block(
        call["out"].view(np.uint32), call["step_keys"][call["layer"] + 1], ATTN, call["first_row"],
        int(settings[6]), int(settings[7]), words, 0,
    )  # fmt: skip
    call["made"][call["layer"], REST_ATTN] = words[0]


def own_keys(mode):
    return mode.exact and mode.grid.sp == 1


def _rotary(which):
    def target(call):
        return call.result[which]

    return target


def _table_row(which):
    """The rotary table's row of the position that the last row of the call has."""

    def strike(call, hand):
        at = int(call["positions"][-1])
        hand.edit(call[which][at : at + 1])
        call.proceed()

    return strike


_TABLE = Fault(
    "rotary cosines as the table is made", ROPE, f"{LAYERS}:Layers._rotary",
    after(lambda call: call.result[0][1:9]), ("scores", "attn", "rotary"),
)  # fmt: skip
_COSINES = Fault(
    "rotary cosines in memory", ROPE, ATTEND, _table_row("cosines"), ("scores", "attn", "rotary"),
    has_rows,
)  # fmt: skip
_SINES = Fault(
    "rotary sines in memory", ROPE, ATTEND, _table_row("sines"), ("scores", "attn", "rotary"),
    has_rows,
)  # fmt: skip
_FREQUENCIES = Fault(
    "rotary frequencies", ROPE, f"{LAYERS}:rope_inverse_frequencies",
    after(lambda call: call.result), ("scores", "attn", "rotary"),
)  # fmt: skip
_POSITION = Fault(
    "a row's position", ROPE, ATTEND,
    other_index("positions", lambda call: int(call["positions"][-1]) + 1), ("scores", "attn"),
    has_past,
)  # fmt: skip
_NORMALISED = Fault(
    "queries and keys after their norm, in memory", QK_NORM, f"{QK}:normalise", after("qkv"),
    ("qk_normed",), fits=exact_olmo,
)  # fmt: skip
_QK_WEIGHTS = Fault(
    "weights of the norm of queries and keys, in memory", QK_NORM, f"{QK}:normalise",
    before("weight"), ("qk_normed", "scores", "attn", "weights"), fits=exact_olmo,
)  # fmt: skip
_QK_MAXIMA = Fault(
    "own row maxima of queries and keys", QK_NORM, f"{QK}:row_maxima",
    after("maxima", how=larger_maximum), ("qk_max", "qk_sum", "qk_normed"), fits=exact_olmo,
)  # fmt: skip
_QK_SUMS = Fault(
    "own sums of squares, before they are reduced", QK_NORM, f"{QK}:sum_squares", after("sent"),
    ("qk_sum", "qk_normed"), fits=exact_olmo,
)  # fmt: skip
_QK_USED = Fault(
    "sums of squares as the norm uses them", QK_NORM, f"{QK}:normalise", before("summed"),
    ("qk_sum", "qk_normed"), fits=exact_olmo,
)  # fmt: skip


FAULTS = (
    _TABLE, alike(_TABLE), _COSINES, alike(_COSINES), _SINES, alike(_SINES),
    _FREQUENCIES, alike(_FREQUENCIES), _POSITION, alike(_POSITION),
    Fault("a row's prompt", ROPE, ATTEND,
          other_index("sequences", lambda call: call["keys"].shape[0]), ("scores", "attn"),
          has_past,
          why=IN_ATTENTION),
    Fault("which key/value head a query head uses", ATTENTION, ATTEND,
          other_index("kv_of_head", lambda call: call["keys"].shape[1]), ("scores", "attn"),
          has_rows,
          why=IN_ATTENTION),
    Fault("how many positions a row sees", ATTENTION, ATTEND,
          before("settings", how=lambda a, rng: a.__setitem__(9, 2)),
          ("scores", "attn", "rotary"), has_rows),
    Fault("keys of the cache", CACHE, ATTEND, past_entry("keys"), ("scores",), has_past),
    Fault("values of the cache", CACHE, ATTEND, past_entry("values"), ("attn",), has_past),
    Fault("a key's exponent in the cache", CACHE, ATTEND, past_entry("key_exponents", plus_one),
          ("scores", "attn"), has_past),
    Fault("a value's exponent in the cache", CACHE, ATTEND, past_entry("value_exponents", plus_one),
          ("attn",), has_past),
    Fault("sums over the keys", CACHE, ATTEND, past_entry("key_sums"), ("scores",), has_past,
          harmless=True),
    Fault("sums of the values", CACHE, ATTEND, past_entry("value_sums"), ("attn",), has_past,
          harmless=True),
    *(Fault(f"two heads of {kind} exchanged with their sums", CACHE, ATTEND, heads_with_sums(kind),
            ("scores", "attn"), has_past)
      for kind in ("keys", "values")),
    *(Fault(f"two positions of {kind} exchanged with their sums", CACHE, ATTEND,
            positions_with_sums(kind), ("scores", "attn"), has_past)
      for kind in ("keys", "values")),
    Fault("two heads exchanged with all that is kept of them", CACHE, ATTEND, whole_heads,
          ("scores", "attn"), has_past),
    Fault("the caches of two prompts exchanged", CACHE, ATTEND, sequences_exchanged,
          ("scores", "attn"), has_past),
    *(Fault(f"{part} between their word and their use", ATTENTION, ATTEND,
            _inside(_part_of_qkv(part)), ("scores", "attn"), has_rows, fits=own_keys,
            why=IN_ATTENTION)
      for part in ("queries", "keys", "values")),
    Fault("attention's output before its word", ATTENTION, ATTEND, _output_before_its_word,
          ("attn",), has_rows, why=IN_ATTENTION),
    Fault("attn in memory", ATTENTION, ATTEND, after("out"), ("attn",), has_rows),
    Fault("qkv before attention", ATTENTION, ATTEND, before("qkv"), ("qkv", "qk_normed"), has_rows),
    Fault("qkv after attention", ATTENTION, ATTEND, after("qkv"), ("qkv", "qk_normed"), has_rows,
          harmless=True),
    _NORMALISED, _QK_WEIGHTS, _QK_MAXIMA, _QK_SUMS, _QK_USED,
    alike(_QK_USED),
)  # fmt: skip
