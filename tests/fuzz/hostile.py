"""Hostile values, and edits of trees of JSON: what a case changes in a sound input."""

import copy
import json
from dataclasses import dataclass

INTEGERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 65535, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53 + 1, 2**62,
    2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**7, 10**9, 10**30,
)  # fmt: skip
FLOATS = (0.0, -0.0, 0.5, 1e-320, 1e300, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "", " ", "x", "0", "-1", "²", "1e999999999", "NaN", "true", "null", "\0", "a\nb\nc",
    "\x1b[31mred\x1b[2J", "\x1b]0;title\x07", "\u202eevil", "\x9b2J", "\ud800", "é→",
    "../../outside/secret", "/etc/passwd", "/dev/zero", "model.safetensors", "=1+1", "%s%n{0}",
    "a" * 300, "b" * 100_000,
)  # fmt: skip


class Raw(str):
    """JSON as it stands: what no Python value can say."""


RAW = (
    Raw("1e999"), Raw("-0"), Raw("1" + "0" * 5000), Raw("1." + "1" * 5000), Raw("[" * 60_000),
    Raw("[" * 900 + "]" * 900), Raw('{"a":' * 60_000), Raw("nul"), Raw(""), Raw('"\\ud800"'),
    Raw("NaN"), Raw("-Infinity"), Raw("[" + "0," * 50_000 + "0]"),
)  # fmt: skip


class Again(str):
    """A key that stands in an object a second time."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


def value(rng, like=None):
    """A hostile value; often of the kind of ``like``."""
    if like is not None and not isinstance(like, str) and rng.random() < 0.2:
        return rng.choice(([like], [like] * 3, {"a": like}, str(like), []))
    if isinstance(like, (int, float)) and not isinstance(like, bool) and rng.random() < 0.5:
        return rng.choice((*INTEGERS, *FLOATS, like + 1, like - 1, -like, like * 2, like + 0.5))
    if isinstance(like, str) and rng.random() < 0.5:
        near = (like + "x", like[:-1], like.upper(), like + "\0", like * 2, like[::-1])
        return rng.choice((*TEXTS, *near))
    pools = (INTEGERS, FLOATS, TEXTS, RAW, (None, True, False, [], {}, [[]], [None], {"a": {}}))
    return copy.deepcopy(rng.choice(rng.choice(pools)))


@dataclass(frozen=True)
class Edit:
    """One change of a tree: ``how`` at ``path``."""

    how: str
    path: tuple
    value: object = None

    def __str__(self):
        shown = f" = {self.value!r}" if self.how in ("set", "add") else ""
        shown = shown if len(shown) < 60 else shown[:50] + f"… ({len(shown)} characters)"
        return f"{self.how} {'/'.join(map(str, self.path))}{shown}"


def paths(tree, start=()):
    """All places of a tree, the leaves and what holds them."""
    found = [start] if start else []
    children = ()
    if isinstance(tree, (dict, list)):
        children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, child in children:
        found += paths(child, (*start, key))
    return found


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def draw_edits(rng, tree, most=3) -> list[Edit]:
    """One to ``most`` edits of a tree; a later one may find its place gone, and does nothing."""
    places = paths(tree)
    edits = []
    for _ in range(rng.choice((1, 1, 1, 2, most))):
        path = rng.choice(places)
        how = rng.choices(("set", "delete", "add", "twice", "rename", "swap"), (12, 2, 1, 1, 1, 1))[0]
        new = value(rng, at(tree, path))
        if how == "swap":
            new = rng.choice(places)
        edits.append(Edit(how, path, new))
    return edits


def edited(tree, edits):
    """A copy of a tree with its edits."""
    tree = copy.deepcopy(tree)
    for edit in edits:
        try:
            _apply(tree, edit)
        except (KeyError, IndexError, TypeError, AttributeError):
            pass  # an earlier edit took the place away
    return tree


def _apply(tree, edit):
    parent, key = at(tree, edit.path[:-1]), edit.path[-1]
    if edit.how == "set":
        parent[key] = edit.value
    elif edit.how == "delete":
        del parent[key]
    elif edit.how == "add":
        parent["unknown"] = edit.value
    elif edit.how == "twice":
        parent[Again(key)] = edit.value
    elif edit.how == "rename":
        parent[str(edit.value)[:1000]] = parent.pop(key)
    elif edit.how == "swap":
        other = at(tree, edit.value[:-1])
        last = edit.value[-1]
        parent[key], other[last] = other[last], parent[key]


def dumps(tree) -> str:
    """JSON of a tree, with Raw as it stands and keys that stand twice."""
    if isinstance(tree, Raw):
        return str.__str__(tree)
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {dumps(v)}" for k, v in tree.items()) + "}"
    if isinstance(tree, (list, tuple)):
        return "[" + ", ".join(map(dumps, tree)) + "]"
    return json.dumps(tree)


def loads_or_none(text):
    """The value of a JSON text where Python can read it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
