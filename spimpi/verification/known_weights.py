"""What knows a run's weights beforehand, a manifest or a golden file: whether it is of this model, and
its words for the checks."""

from dataclasses import dataclass

from spimpi.errors import UsageError
from spimpi.inference.derived import derived_names
from spimpi.inference.derived_check import multiplied
from spimpi.inference.exact import ARITHMETIC
from spimpi.manifest.format import Manifest, TensorFacts, read_manifest

_SHOWN = 3


@dataclass(frozen=True)
class KnownWeights:
    """A manifest and the file that it is from."""

    file: str
    manifest: Manifest

    @property
    def words(self) -> dict[str, int]:
        """The fingerprints of the tensors and of the derived ones, by name."""
        return {name: f.fingerprint for name, f in self.manifest.all_tensors.items()}

    @property
    def has_derived(self) -> bool:
        return self.manifest.derived is not None

    def require_fit(self, config, checkpoint, seed: int, exact: bool) -> None:
        """Raise UsageError unless the manifest is of this model and seed. Local.

        ``exact``: its derived tensors are compared too, and must be those of this arithmetic.
        """
        if self.manifest.seed != seed:
            msg = (
                f"the manifest {self.file} has the seed {self.manifest.seed}, the run {seed} (--seed, "
                "or the golden file's), and they must be the same: leave out --seed, or make the "
                f"manifest again with --seed {seed}"
            )
            raise UsageError(msg)
        stored = {n: (r.dtype, r.shape) for n, r in checkpoint.tensors.items()}
        found = {n: (f.stored.numpy_name, f.shape) for n, f in self.manifest.tensors.items()}
        unknown = [name for name in stored if name not in found]
        if unknown:
            self._refuse(f"it lacks {_listed(unknown)} of the {len(stored)} tensors of the model")
        left = [name for name in found if name not in stored and name not in checkpoint.ignored]
        if left:
            self._refuse(f"the checkpoint lacks {_listed(left)} of its {len(found)} tensors")
        others = [name for name in stored if stored[name] != found[name]]
        if others:
            name = others[0]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            self._refuse(
                f"{name} is {_told(*found[name])} there and {_told(*stored[name])} in the "
                f"checkpoint{more}"
            )
        if exact and self.has_derived:
            self._require_derived(config, checkpoint)

    def _require_derived(self, config, checkpoint) -> None:
        derived = self.manifest.derived
        again = "make the manifest again (spimpi manifest make --derived)"
        if derived.arithmetic != ARITHMETIC:
            msg = (
                f"the manifest {self.file} has derived tensors of the arithmetic "
                f"{derived.arithmetic}, this spimpi computes in {ARITHMETIC}: {again}"
            )
            raise UsageError(msg)
        for name in multiplied(config):
            shape = checkpoint.tensors[name].shape
            kinds = TensorFacts("F32", shape), TensorFacts("I32", shape[:1])
            for wanted, expected in zip(derived_names(name), kinds):
                found = derived.tensors.get(wanted)
                if found is None or not found.same_kind(expected):
                    msg = (
                        f"the manifest {self.file} must have the derived tensor {wanted!r}, "
                        f"{expected}, found {found or 'none'}: {again}"
                    )
                    raise UsageError(msg)

    def _refuse(self, why: str):
        msg = f"the manifest {self.file} is of another model: {why}"
        raise UsageError(msg)


@dataclass(frozen=True)
class GoldenWeights:
    """The fingerprints of the weights that a golden run was made of, and its file."""

    file: str
    words: dict[str, int]
    has_derived = False

    def require_same(self, known: KnownWeights) -> None:
        """Raise UsageError where a manifest has another word for a tensor. Local."""
        theirs = known.words
        others = [name for name, word in self.words.items() if theirs[name] != word]
        if others:
            msg = (
                f"the manifest {known.file} and the golden file {self.file} are of other weights: "
                f"{_listed(others)} differ; make both of one checkpoint"
            )
            raise UsageError(msg)


def golden_weights(golden, checkpoint) -> GoldenWeights:
    """The words of a golden file that is of this model. UsageError where their number differs."""
    if len(golden.weights) != len(checkpoint.tensors):
        msg = (
            f"{golden.source} is damaged: it has fingerprints of {len(golden.weights)} weights, its "
            f"model has {len(checkpoint.tensors)}"
        )
        raise UsageError(msg)
    words = (int(word) for word in golden.weights)
    return GoldenWeights(golden.source, dict(zip(checkpoint.tensors, words)))


def read_known_weights(file) -> KnownWeights:
    """Raises UsageError where the file is no manifest that can be read. Local."""
    return KnownWeights(str(file), read_manifest(file))


def _listed(names) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _told(dtype, shape) -> str:
    return f"{dtype} {list(shape)}"
