"""Which elements of a global tensor a rank holds."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import index

from spimpi.errors import UsageError


def balanced_sizes(global_size: int, n_shards: int) -> tuple[int, ...]:
    """Sizes of balanced blocks: the first ``global_size % n_shards`` are one longer."""
    quotient, remainder = divmod(global_size, n_shards)
    return tuple(quotient + (i < remainder) for i in range(n_shards))


def _whole(name, value) -> int:
    try:
        return index(value)
    except TypeError:
        msg = f"{name} of a partition must be a whole number, found {value!r}"
        raise UsageError(msg) from None


@dataclass(frozen=True)
class Slab:
    """A block of a global tensor: the global shape and where the block's first element lies.

    The block's own shape is that of the array that comes with it.
    """

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "global_shape", tuple(int(n) for n in self.global_shape))
        object.__setattr__(self, "offset", tuple(int(n) for n in self.offset))
        if len(self.global_shape) != len(self.offset):
            msg = (
                f"a slab's offset needs one entry per axis of the global shape: "
                f"found offset {self.offset} for shape {self.global_shape}"
            )
            raise UsageError(msg)
        if any(n < 0 for n in self.global_shape + self.offset):
            msg = f"negative size or offset in slab {self.offset} of {self.global_shape}"
            raise UsageError(msg)

    def check_holds(self, local_shape) -> None:
        """Raise UsageError unless a block of ``local_shape`` at the offset lies in the tensor."""
        local_shape = tuple(local_shape)
        fits = len(local_shape) == len(self.global_shape) and all(
            start + n <= total or n == 0
            for start, n, total in zip(self.offset, local_shape, self.global_shape)
        )
        if not fits:
            msg = (
                f"an array of shape {local_shape} at offset {self.offset} does not lie in a "
                f"tensor of global shape {self.global_shape}"
            )
            raise UsageError(msg)


@dataclass(frozen=True)
class TensorPartition:
    """How one axis of a global tensor is cut into shards, and which shard this is.

    ``dim`` counts axes from 0. Without ``sizes`` the blocks are balanced, the first
    ``global_size % n_shards`` one longer; with ``sizes`` (weighted splits) they are as given.
    A shard may be empty. The other axes are taken from the shard's own shape.
    """

    dim: int
    n_shards: int
    shard_id: int
    global_size: int
    sizes: tuple[int, ...] | None = None

    def __post_init__(self):
        for name in ("dim", "n_shards", "shard_id", "global_size"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if self.n_shards < 1 or not 0 <= self.shard_id < self.n_shards:
            msg = f"shard_id must lie in 0..{self.n_shards - 1}, found {self.shard_id}"
            raise UsageError(msg)
        if self.dim < 0 or self.global_size < 0:
            msg = f"dim and global_size must not be negative, found {self.dim}, {self.global_size}"
            raise UsageError(msg)
        if self.sizes is None:
            return
        sizes = tuple(_whole("sizes", n) for n in self.sizes)
        object.__setattr__(self, "sizes", sizes)
        if len(sizes) != self.n_shards or min(sizes) < 0 or sum(sizes) != self.global_size:
            msg = (
                f"sizes must be {self.n_shards} non-negative numbers that add up to "
                f"{self.global_size}, found {list(sizes)}"
            )
            raise UsageError(msg)

    @cached_property
    def all_sizes(self) -> tuple[int, ...]:
        return self.sizes or balanced_sizes(self.global_size, self.n_shards)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.all_sizes, initial=0))

    @property
    def start(self) -> int:
        return self.starts[self.shard_id]

    @property
    def size(self) -> int:
        return self.all_sizes[self.shard_id]

    @property
    def stop(self) -> int:
        return self.start + self.size

    def slab(self, local_shape) -> Slab:
        """The slab of a shard with this shape; its axis ``dim`` must have the shard's size."""
        local_shape = tuple(local_shape)
        if self.dim >= len(local_shape) or local_shape[self.dim] != self.size:
            msg = (
                f"shard {self.shard_id} of {self.n_shards} must have {self.size} entries along "
                f"axis {self.dim}, found an array of shape {local_shape}"
            )
            raise UsageError(msg)
        global_shape = list(local_shape)
        global_shape[self.dim] = self.global_size
        offset = [0] * len(local_shape)
        offset[self.dim] = self.start
        return Slab(tuple(global_shape), tuple(offset))


def whole(shape) -> Slab:
    """The slab that is the whole tensor."""
    return Slab(tuple(shape), (0,) * len(tuple(shape)))


@dataclass(frozen=True)
class ShardedTensor:
    """A rank's shard of a global tensor: the local array, its partition and the tensor's tag."""

    array: object
    partition: TensorPartition
    tag: object

    @property
    def slab(self) -> Slab:
        """The global shape, and where this shard lies in it."""
        return self.partition.slab(self.array.shape)

    def global_index(self, *index: int) -> int:
        """The global linear (row-major) index of a local element."""
        slab = self.slab
        linear = 0
        for i, start, size in zip(index, slab.offset, slab.global_shape, strict=True):
            linear = linear * size + start + i
        return linear

    def fingerprint(self, threads: int = 1) -> int:
        """This shard's share of the whole tensor's fingerprint."""
        from spimpi.fingerprint import fingerprint

        return fingerprint(self.array, self.tag, self.partition, threads)
