"""The elementary functions against mpmath, and the promise that their bits never vary."""

import math
import os
import platform
import re
import subprocess
import sys

import numba
import numpy as np
import pytest
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spimpi.inference import elementary

GOLDEN_DIGEST = 0x7795146dc228ed0d
RANGE = 2**20 * math.pi / 2
X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.fixture(scope="module")
def mpmath():
    return pytest.importorskip("mpmath", reason="mpmath is the reference")


def worst_ulps(mpmath, results, function, arguments):
    """The largest error in units in the last place of the exact value (250-bit arithmetic)."""
    with mpmath.workprec(250):
        worst = 0.0
        for result, argument in zip(results, arguments, strict=True):
            exact = function(mpmath.mpf(float(argument)))
            ulp = float(np.spacing(abs(float(exact))))
            worst = max(worst, float(abs(mpmath.mpf(float(result)) - exact) / ulp))
    return worst


def uniform(limit, n=1000, seed=1):
    return np.random.default_rng(seed).uniform(-limit, limit, n)


def bits(x):
    return np.asarray(x).view(np.uint64)


@pytest.mark.parametrize("limit", [0.35, 1.0, 20.0, 700.0])
def test_exp_is_within_nine_tenths_of_an_ulp(mpmath, limit):
    x = uniform(limit)
    assert worst_ulps(mpmath, elementary.table(x)[0], mpmath.exp, x) < 0.9


def test_exp_underflows_through_denormals_rounded_once(mpmath):
    x = np.linspace(-745.13, -708.0, 1000)
    assert worst_ulps(mpmath, elementary.table(x)[0], mpmath.exp, x) < 1.0


def test_exp_at_its_ends():
    last, first_inf = 709.782712893384, 709.7827128933841
    smallest, first_zero = -745.1332191019411, -745.1332191019412
    x = np.array([last, first_inf, 1e308, np.inf, smallest, first_zero, -1e308, -np.inf])
    y = elementary.table(x)[0]
    assert np.isfinite(y[0]) and y[0] > 1.797e308
    assert y[1:].tolist() == [np.inf] * 3 + [5e-324, 0.0, 0.0, 0.0]
    assert elementary.table(np.array([0.0, -0.0, 5e-324]))[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("limit", [0.8, 7.0, 1e3, 131072.0, RANGE])
def test_sine_and_cosine_are_within_eight_tenths_of_an_ulp(mpmath, limit):
    x = uniform(limit)
    _, sine, cosine, _ = elementary.table(x)
    assert worst_ulps(mpmath, sine, mpmath.sin, x) < 0.8
    assert worst_ulps(mpmath, cosine, mpmath.cos, x) < 0.8


def test_the_reduction_holds_next_to_multiples_of_half_pi(mpmath):
    # There nearly all bits cancel; a reduction by fewer parts of pi/2 loses them.
    n = np.concatenate([np.arange(1, 200), 2**20 - np.arange(200)])
    with mpmath.workprec(250):
        x = np.array([float(int(i) * mpmath.pi / 2) for i in n])
    x = np.concatenate([x, np.nextafter(x, 0), np.nextafter(x, np.inf), -x])
    _, sine, cosine, _ = elementary.table(x)
    assert worst_ulps(mpmath, sine, mpmath.sin, x) < 0.8
    assert worst_ulps(mpmath, cosine, mpmath.cos, x) < 0.8


def test_rsqrt_is_within_one_and_a_half_ulps(mpmath):
    x = np.concatenate([np.abs(uniform(1e3)), [5e-324, 1e-310, 2.0**-1022, 1.0, 4.0, 1e300]])
    y = elementary.table(x)[3]
    assert worst_ulps(mpmath, y, lambda v: 1 / mpmath.sqrt(v), x) <= 1.5
    assert (bits(y) == bits(1.0 / np.sqrt(x))).all()  # two IEEE operations: numpy's are the same


def test_nan_stays_nan_and_inf_has_no_sine():
    x = np.array([np.nan, -np.nan])
    assert np.isnan(elementary.table(x)).all()
    assert np.isnan(elementary.table(np.array([np.inf, -np.inf]))[1:3]).all()


def test_bits_do_not_depend_on_vector_width_or_place():
    x = np.concatenate([uniform(30.0, 101), uniform(740.0, 101), uniform(RANGE, 101)])
    whole = bits(elementary.table(x))
    for size in (1, 3, 7, 8, 17):  # scalar tails of every length
        parts = [elementary.table(x[i : i + size]) for i in range(0, len(x), size)]
        assert (bits(np.concatenate(parts, axis=1)) == whole).all()


@pytest.mark.skipif(not X86, reason="names x86 processors")
@pytest.mark.parametrize("processor", ["generic", "haswell"])
def test_code_compiled_for_another_processor_gives_the_same_bits(processor, tmp_path):
    # 2 or 4 float64 a vector, without and with the instructions that a contraction would use.
    environment = dict(os.environ, NUMBA_CPU_NAME=processor, SPIMPI_CACHE_DIR=str(tmp_path))
    features = binding.get_host_cpu_features()
    if processor == "haswell" and not (features.get("avx2") and features.get("fma")):
        pytest.skip("this processor has no AVX2 and FMA")
    environment["NUMBA_CPU_FEATURES"] = "" if processor == "generic" else "+avx,+avx2,+fma"
    code = "from spimpi.inference import elementary; print(elementary.digest())"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == GOLDEN_DIGEST


def test_exp_has_the_bits_of_plain_python_floats():
    # CPython evaluates + - * / one IEEE operation at a time: an independent strict evaluation.
    x = np.concatenate([uniform(0.4, 100), uniform(30.0, 100), uniform(700.0, 100)])
    expected = np.array([_python_exp(value) for value in x.tolist()])
    assert (bits(elementary.table(x)[0]) == bits(expected)).all()


def _python_exp(x):
    e = elementary
    shifted = x * e._LOG2_E + e._TO_INTEGER
    whole = shifted - e._TO_INTEGER
    a, b = x - whole * e._LN2_1, whole * e._LN2_2
    r = a - b
    rest = (a - r) - b
    p = 1 / math.factorial(13)
    for n in range(12, 1, -1):
        p = 1 / math.factorial(n) + r * p
    k = int(whole)
    y = 1.0 + (r + ((r * r) * p + rest))
    return y * 2.0 ** (k >> 1) * 2.0 ** (k - (k >> 1))


def test_the_digest_is_the_one_of_every_machine():
    assert elementary.digest() == GOLDEN_DIGEST


@pytest.mark.skipif(not X86, reason="reads x86 assembly")
def test_the_compiled_code_has_no_fused_multiply_add():
    fused = re.compile(r"\bvfn?m(?:add|sub)")
    signature, function = "void(f8[::1], f8[:, ::1])", elementary._table_kernel().py_func
    strict = numba.njit([signature], nogil=True, error_model="numpy")(function)
    assert not fused.search(strict.inspect_asm(strict.signatures[0]))
    if binding.get_host_cpu_features().get("fma"):  # the search finds them where they are
        loose = numba.njit("f8(f8, f8, f8)", fastmath={"contract"})(lambda a, b, c: a * b + c)
        assert fused.search(loose.inspect_asm(loose.signatures[0]))


@intrinsic
def _load_mxcsr(typing_context, value):
    def generate(context, builder, signature, arguments):
        place = cgutils.alloca_once_value(builder, arguments[0])
        pointer = builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.ldmxcsr")
        builder.call(function, [pointer])
        return context.get_dummy_value()

    return types.void(types.uint32), generate


@pytest.mark.skipif(not X86, reason="sets x86's MXCSR")
def test_a_processor_that_flushes_denormals_shows_in_the_digest():
    @numba.njit("void(u4)")
    def set_mxcsr(value):
        _load_mxcsr(value)

    default, flush_to_zero, denormals_are_zero = 0x1F80, 0x8000, 0x0040
    digests = []
    for fault in (flush_to_zero, denormals_are_zero):
        set_mxcsr(default | fault)
        try:
            digests.append(elementary.digest())
        finally:
            set_mxcsr(default)
    assert elementary.digest() == GOLDEN_DIGEST
    assert GOLDEN_DIGEST not in digests
