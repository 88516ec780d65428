"""The inner loop of projections.py as vector code, so that the order of its sums is known.

Left to itself the compiler may add a loop's elements in any order or not vectorise them at all.
Here lane j of a vector adds the elements j, j + WIDTH, ... and the lanes are then added as a
binary tree: few roundings, on every machine the same, and docs/sums.md counts them.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WIDTH = 16
# Where ranks share a cache or a core, the processor's own prefetcher comes late: 2 to 12% less
# time beside another rank. Into the L2 cache; a place outside the array does no harm.
_AHEAD, _LINE_BYTES = 1024, 64

_BYTE = ir.IntType(8)
_WORD, _HALF, _DOUBLE, _SINGLE = ir.IntType(64), ir.IntType(32), ir.DoubleType(), ir.FloatType()
# A coefficient's sign and fraction are the word's; its exponent puts it between 1/2 and 1.
SIGN_AND_FRACTION, EXPONENT = 0x800FFFFFFFFFFFFF, 0x3FE0000000000000


def _of(element, width):
    return ir.VectorType(element, width)


def _splat(width, value, element=_WORD):
    return ir.Constant(_of(element, width), [value] * width)


def _load(builder, pointer, place, element, width):
    """``width`` elements from element ``place`` on, of any alignment."""
    first = builder.gep(pointer, [place])
    loaded = builder.load(builder.bitcast(first, _of(element, width).as_pointer()))
    loaded.align = 4 if element in (_SINGLE, _HALF) else 8
    return loaded


def _call(builder, name, *arguments):
    kind = arguments[0].type
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(kind, [kind] * len(arguments)),
        f"llvm.{name}.v{kind.count}f64",
    )
    return builder.call(function, arguments)


def _prefetch(builder, pointer, place, n_bytes):
    """Ask for the cache lines of ``n_bytes`` from element ``place`` on."""
    address = _BYTE.as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(ir.VoidType(), [address, _HALF, _HALF, _HALF]),
        "llvm.prefetch.p0",
    )
    first = builder.bitcast(builder.gep(pointer, [place]), address)
    for byte in range(0, n_bytes, _LINE_BYTES):
        line = builder.gep(first, [_WORD(byte)])
        builder.call(function, [line, _HALF(0), _HALF(2), _HALF(1)])  # read, L2, data


def _tree(builder, vector, add):
    """The sum of a vector's lanes."""
    width = vector.type.count
    while width > 1:
        width //= 2
        low, high = (
            ir.Constant(_of(_HALF, width), list(range(first, first + width)))
            for first in (0, width)
        )
        vector = add(*(builder.shuffle_vector(vector, vector, one) for one in (low, high)))
    return builder.extract_element(vector, _HALF(0))


class _Step:
    """What is added for ``width`` elements at a time."""

    def __init__(self, builder, element, width):
        self.builder, self.element, self.width = builder, element, width

    def widened(self, values):
        if self.element is _SINGLE:
            return self.builder.fpext(values, _of(_DOUBLE, self.width))
        return values

    def coefficient(self, words):
        own = self.builder.and_(words, _splat(self.width, SIGN_AND_FRACTION))
        own = self.builder.or_(own, _splat(self.width, EXPONENT))
        return self.builder.bitcast(own, _of(_DOUBLE, self.width))

    def hashed(self, values, words):
        """(what the plain sum adds, what the keyed one adds) for the bits of ``values``."""
        builder, width = self.builder, self.width
        if self.element is _SINGLE:
            bits = builder.zext(builder.bitcast(values, _of(_HALF, width)), _of(_WORD, width))
            return bits, builder.mul(bits, words)
        bits = builder.bitcast(values, _of(_WORD, width))
        halves = _of(_HALF, 2 * width)
        keyed = builder.add(builder.bitcast(bits, halves), builder.bitcast(words, halves))
        keyed = builder.bitcast(keyed, _of(_WORD, width))
        low = builder.and_(keyed, _splat(width, 0xFFFFFFFF))
        return bits, builder.mul(low, builder.lshr(keyed, _splat(width, 32)))


def _sums(width, both):
    """An intrinsic that adds up ``count`` times ``width`` elements."""

    def generate(context, builder, signature, arguments):
        *_, place, word, count = arguments
        data = [
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args, arguments[:-3])
        ]
        element = _DOUBLE if signature.args[0].dtype == types.float64 else _SINGLE
        step = _Step(builder, element, width)
        floats, words = _of(_DOUBLE, width), _of(_WORD, width)
        kinds = [floats] * 3 + [words] * 2 if both else [floats] * 2
        totals = [cgutils.alloca_once(builder, kind) for kind in kinds]
        for total in totals:
            builder.store(ir.Constant(total.type.pointee, None), total)

        def add(slot, value, operation):
            builder.store(operation(builder.load(totals[slot]), value), totals[slot])

        def add_product(slot, a, b):
            total = builder.load(totals[slot])
            builder.store(_call(builder, "fmuladd", a, b, total), totals[slot])

        with cgutils.for_range(builder, count, intp=_WORD) as loop:
            start = builder.mul(loop.index, _WORD(width))
            here = builder.add(place, start)
            if width == WIDTH:
                later = builder.add(here, _WORD(_AHEAD))
                for array in data[:-1]:
                    _prefetch(builder, array, later, width * signature.args[0].dtype.bitwidth // 8)
            key = _load(builder, data[-1], builder.add(word, start), _WORD, width)
            coefficient = step.coefficient(key)
            own = step.widened(_load(builder, data[0], here, element, width))
            add_product(0, own, coefficient)
            add(1, _call(builder, "fabs", own), builder.fadd)
            if both:
                found = _load(builder, data[1], here, element, width)
                add_product(2, step.widened(found), coefficient)
                for slot, more in enumerate(step.hashed(found, key), 3):
                    add(slot, more, builder.add)
        ends = [
            _tree(builder, builder.load(total), builder.fadd if kind is floats else builder.add)
            for total, kind in zip(totals, kinds)
        ]
        return context.make_tuple(builder, signature.return_type, ends)

    if both:

        @intrinsic
        def sums(typing_context, x, result, words, place, word, count):
            """(Σ w x, Σ|x|, Σ w result, Σ bits, Σ hash of bits) of count * width elements."""
            floats, whole = types.float64, types.uint64
            out = types.Tuple((floats, floats, floats, whole, whole))
            return out(x, result, words, types.uint64, types.uint64, types.uint64), generate
    else:

        @intrinsic
        def sums(typing_context, x, words, place, word, count):
            """(Σ w x, Σ|x|) of count * width elements."""
            out = types.UniTuple(types.float64, 2)
            return out(x, words, types.uint64, types.uint64, types.uint64), generate

    return sums


wide_sums, narrow_sums = _sums(WIDTH, both=False), _sums(1, both=False)
wide_sums_of_both, narrow_sums_of_both = _sums(WIDTH, both=True), _sums(1, both=True)
