"""A trace as a pandas DataFrame, names for numbers, of the rows that a condition chooses."""

import ast
import io
import tokenize

import numpy as np

from spimpi.errors import MissingDependency, UsageError
from spimpi.trace.names import Names
from spimpi.trace.schema import EVENT

NAMED = ("host", "stage", "op", "verdict", "tensor")  # categorical
COLUMNS = ("rank", "host", *EVENT.names)


def to_pandas(trace, columns=None, where: str | None = None, ranks=None):
    """What ``Trace.to_pandas`` gives: only rows that ``where`` chooses are ever held."""
    pandas = _pandas()
    frames = _Frames(trace)
    columns = list(COLUMNS if columns is None else columns)
    tested = _read_by(where, frames) if where else []
    needed = list(dict.fromkeys(columns + tested))
    for name in needed:
        if name not in COLUMNS:
            msg = f"a trace has no column {name!r}; there are {', '.join(COLUMNS)}"
            raise UsageError(msg)
    pieces = []
    for block in trace.blocks([name for name in needed if name in EVENT.names], ranks):
        if where:
            block = block.where(_chosen(frames.frame(block, tested), where))
        pieces.append(frames.frame(block, columns))
    if not pieces:
        nothing = np.zeros(0, [("rank", "i4"), ("host", "i4"), *EVENT.descr])
        return frames.frame(nothing, columns)
    for name in set(columns) & set(NAMED):
        for piece in pieces:
            if len(piece[name].cat.categories) != len(frames.categories[name]):
                piece[name] = piece[name].cat.set_categories(frames.categories[name])
    return pandas.concat(pieces, ignore_index=True)


class _Frames:
    """Frames of blocks; the names in the named columns as pandas categories.

    Numbers without a name, which a later spimpi may have added, are called "op 37".
    """

    def __init__(self, trace):
        self._names = Names(trace)
        words = {name: self._names.words[name] for name in NAMED}
        self.categories = {name: word.values[: word.n_known] for name, word in words.items()}

    def frame(self, block, columns):
        """Columns of a block side by side."""
        columns = {name: self.column(block, name) for name in columns}
        return _pandas().DataFrame(columns, copy=False)

    def column(self, block, name: str):
        """A column of a block: as it is, or as a pandas Categorical."""
        if name not in NAMED:
            return block[name]
        codes = self._names.codes(block, name)
        seen = 1 + int(codes.max(initial=-1))
        if seen > len(self.categories[name]):
            self.categories[name] = self._names.words[name].values[:seen]
        return _pandas().Categorical.from_codes(codes, self.categories[name])


def _read_by(where: str, frames: _Frames) -> list[str]:
    """The columns that a condition reads; UsageError where it names what cannot be.

    A name that no row can have (``verdict == 'failed'``, ``op == 9``) would choose nothing, and
    nothing is what one hopes to find.
    """
    try:
        tree = ast.parse(_as_python(where.strip()), mode="eval")
    except (SyntaxError, tokenize.TokenError):
        msg = f"not a condition: {where!r}; one is \"verdict == 'FAILED' and layer >= 3\""
        raise UsageError(msg) from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for name in {side.id for side in sides if isinstance(side, ast.Name)} & set(NAMED):
                for side in sides:
                    _check_values(side, name, frames.categories[name])
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def _as_python(where: str) -> str:
    """In a condition of pandas ``&`` and ``|`` bind as ``and`` and ``or`` do."""
    words = {"&": (tokenize.NAME, "and"), "|": (tokenize.NAME, "or")}
    tokens = tokenize.generate_tokens(io.StringIO(where).readline)
    return tokenize.untokenize(words.get(token.string, token[:2]) for token in tokens)


def _check_values(side, name: str, known: list[str]) -> None:
    for value in side.elts if isinstance(side, ast.List | ast.Tuple) else [side]:
        if isinstance(value, ast.Constant) and value.value not in known:
            some = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
            msg = f"the trace has no {name} {value.value!r}; there are {some}"
            raise UsageError(msg)


def _chosen(frame, where: str) -> np.ndarray:
    """Positions of the rows for which the condition holds."""
    try:
        chosen = np.asarray(frame.eval(where, engine="python"))
    except Exception as error:  # noqa: BLE001  pandas raises anything on what it cannot evaluate
        msg = f"pandas cannot evaluate the condition {where!r}: {error}"
        raise UsageError(msg) from error
    if chosen.dtype != bool or chosen.shape != (len(frame),):
        msg = f"{where!r} is no condition: it gives {chosen.dtype} of shape {chosen.shape} for rows"
        raise UsageError(msg)
    return np.flatnonzero(chosen)


def _pandas():
    try:
        import pandas
    except ImportError:
        msg = "to_pandas needs pandas: pip install 'spimpi[trace]'"
        raise MissingDependency(msg) from None
    return pandas
