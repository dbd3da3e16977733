"""Numbers of one small layer that PEFT was seen to give, from its seed to the adapted output."""

import hashlib
import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from randlora_jax import RandLoraDotGeneral, delta_weight

PUBLISHED = json.loads((pathlib.Path(__file__).parent / "golden" / "published.json").read_text())
MODES = ("dense", "sparse", "very_sparse")
R, IN, OUT, N = 4, 6, 10, 2


def peft_bases(mode):
    """PEFT's A and B for seed 0: one stream of Mersenne twister words, A's first."""
    stream = np.random.RandomState(0)._bit_generator.random_raw

    def uniform(*shape):
        return ((stream(math.prod(shape)) & 0xFFFFFF) / 2**24).reshape(shape)

    def dense(*shape):  # Kaiming's bounds, in bfloat16
        bound = np.float64(np.float32(1 / math.sqrt(shape[1] * shape[2])))
        bfloat16 = lambda x: np.asarray(x, np.float32).astype(jnp.bfloat16)
        values = bfloat16(uniform(*shape) * np.float32(2 * bound) - bound)
        return np.where(values == bfloat16(bound), bfloat16(-bound), values)

    def ternary(*shape):
        p = np.float32(1 / 6 if mode == "sparse" else 1 / (2 * math.sqrt(IN)))
        u = uniform(*shape).astype(np.float32)
        return (u > 1 - p).astype(np.float32) - (u < p).astype(np.float32)

    def normalised(values):
        deviation = values.astype(np.float64).std(ddof=1).astype(values.dtype)
        return (values / deviation).astype(np.float32)

    if mode == "dense":
        A = dense(R, 1, IN)
        B = np.concatenate([dense(OUT, 1, R) for _ in range(N)], axis=1)
    else:
        A, B = ternary(R, 1, IN), ternary(OUT, N, R)
    return normalised(A), normalised(B)


def scales():
    lam = jnp.arange(R * N, dtype=jnp.float32).reshape(R, N) / 10
    gamma = (jnp.arange(N * IN, dtype=jnp.float32).reshape(N, IN) + 1) / 100
    return lam, gamma


@pytest.fixture(params=MODES)
def published(request):
    return PUBLISHED[request.param], [jnp.asarray(x) for x in peft_bases(request.param)]


def test_the_bases_of_these_tests_are_those_that_peft_drew(published):
    expected, bases = published
    for array, name in zip(bases, ("A_hash", "B_hash"), strict=True):
        assert hashlib.sha256(np.asarray(array).tobytes()).hexdigest()[:16] == expected[name]


def test_the_update_is_the_published_one(published):
    expected, bases = published
    delta = delta_weight(*bases, *scales(), IN, OUT, 1.0)
    np.testing.assert_allclose(delta.sum(), expected["sum(delta)"], rtol=1e-5)
    if "delta[0]" in expected:
        np.testing.assert_allclose(delta[:, 0], expected["delta[0]"], rtol=1e-5)


@pytest.mark.parametrize("strategy", ["auto", "merged", "factored"])
def test_the_output_is_the_published_one(strategy):
    A, B = peft_bases("dense")
    dot_general = RandLoraDotGeneral(
        {"randlora_A": jnp.asarray(A), "randlora_B": jnp.asarray(B)}, (scales(),), strategy=strategy
    )
    x, kernel = jnp.arange(IN, dtype=jnp.float32) / IN, jnp.zeros((IN, OUT))
    y = dot_general(x, kernel, (((0,), (0,)), ((), ())))
    np.testing.assert_allclose(y[:3], PUBLISHED["dense"]["output[:3]"], rtol=1e-5)
