"""The operation's values and gradients: PEFT's golden numbers, and a float64 reference."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from randlora_jax import RandLoraConfig, RandLoraDotGeneral, delta_weight
from tests.compiling import shipped_jit

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "operation.json").read_text())}
STRATEGIES = ("auto", "merged", "factored")


@functools.cache
def golden():
    return load_file(GOLDEN / "operation.safetensors")


def dense(x, kernel, A, B, lam, gamma, scaling, strategy="auto", axes=None):
    """`x . (W + dW)`, contracting the last axis of x unless `axes` says which ones."""
    dot_general = RandLoraDotGeneral(
        {"randlora_A": A, "randlora_B": B}, ((lam * scaling, gamma),), strategy=strategy
    )
    axes = (x.ndim - 1,) if axes is None else axes
    return dot_general(x, kernel, ((axes, tuple(range(len(axes)))), ((), ())))


def reference(x, kernel, A, B, lam, gamma, scaling, dy):
    """y and the gradients of sum(y * dy) to x, kernel, lambda and gamma, in float64."""
    arrays = (x, kernel, A, B, lam, gamma, dy)
    x, kernel, A, B, lam, gamma, dy = (np.asarray(a, np.float64) for a in arrays)
    in_features, out_features = kernel.shape
    small, large = min(kernel.shape), max(kernel.shape)
    r, n = lam.shape
    j = np.arange(r * n)
    V = B[:large, j // r, j % r]
    k, b = j // n, j % n
    M = V @ (lam[k, b][:, None] * A[k, 0, :small] * gamma[b])
    transposed = in_features <= out_features
    y = x @ (kernel + scaling * (M.T if transposed else M))
    d_kernel = x.T @ dy
    d_M = scaling * (d_kernel.T if transposed else d_kernel)
    d_U = V.T @ d_M
    d_lam, d_gamma = np.zeros_like(lam), np.zeros_like(gamma)
    np.add.at(d_lam, (k, b), (d_U * A[k, 0, :small] * gamma[b]).sum(1))
    np.add.at(d_gamma, b, d_U * A[k, 0, :small] * lam[k, b][:, None])
    d_x = dy @ (kernel + scaling * (M.T if transposed else M)).T
    return y, (d_x, d_kernel, d_lam, d_gamma)


def layer(in_features, out_features, r, tokens, seed, spare=(0, 0)):
    """Random x, kernel, A, B, lambda, gamma and dy; the bases larger than the layer by `spare`."""
    small, large = sorted((in_features, out_features))
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    n = math.ceil(small / r)
    A, B = normal(r, 1, small + spare[0]), normal(large + spare[1], n + spare[0], r)
    x, kernel = normal(tokens, in_features), normal(in_features, out_features)
    return (x, kernel, A, B, normal(r, n), normal(n, small)), normal(tokens, out_features)


def assert_close(actual, expected, tolerance):
    expected = np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert error <= tolerance * np.abs(expected).max()


def value_and_pullback(x, kernel, A, B, lam, gamma, dy, scaling, strategy):
    def output(x, kernel, lam, gamma):
        return dense(x, kernel, A, B, lam, gamma, scaling, strategy)

    y, vjp = jax.vjp(output, x, kernel, lam, gamma)
    return y, vjp(dy)


output_and_gradients = jax.jit(value_and_pullback, static_argnames=("scaling", "strategy"))
as_shipped = shipped_jit(value_and_pullback, static_argnames=("scaling", "strategy"))


@pytest.mark.parametrize("name", CASES)
def test_update_is_that_of_peft(name):
    case = CASES[name]
    load = lambda key: jnp.asarray(golden()[f"{name}/{key}"])
    delta = delta_weight(
        load("A"),
        load("B"),
        load("lambda"),
        load("gamma"),
        case["in_features"],
        case["out_features"],
        case["scaling"],
    )
    assert delta.dtype == jnp.float32
    assert_close(delta, load("delta").T, 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_peft(name, strategy):
    load = lambda key: jnp.asarray(golden()[f"{name}/{key}"])
    scaling = RandLoraConfig(
        r=CASES[name]["r"], randlora_alpha=CASES[name]["randlora_alpha"]
    ).scaling
    assert scaling == CASES[name]["scaling"]
    y, (d_x, _, d_lam, d_gamma) = as_shipped(
        load("x"),
        load("weight").T,
        load("A"),
        load("B"),
        load("lambda"),
        load("gamma"),
        load("probe"),
        scaling,
        strategy,
    )
    if CASES[name]["bias"]:
        y = y + load("bias")[None]
    assert_close(y, load("y"), 1e-5)
    assert_close(d_x, load("grad_x"), 1e-5)
    assert_close(d_lam, load("grad_lambda"), 1e-5)
    assert_close(d_gamma, load("grad_gamma"), 1e-5)


def shapes(draw):
    in_features, out_features = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    small = min(in_features, out_features)
    r = draw(st.sampled_from(sorted({1, 2, small, small + 3, max(1, small - 1), 5})))
    tokens = draw(st.sampled_from([1, 2, 7, 40, 300]))
    spare = draw(st.sampled_from([(0, 0), (3, 0), (0, 2), (4, 5)]))
    return in_features, out_features, r, tokens, draw(st.integers(0, 2**16)), spare


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
@given(st.composite(shapes)())
def test_any_shape_agrees_with_float64(strategy, shape):
    arrays, dy = layer(*shape)
    y, gradients = output_and_gradients(*arrays, dy, 1.5, strategy)
    expected_y, expected = reference(*arrays, 1.5, dy)
    assert_close(y, expected_y, 2e-5)
    for gradient, value in zip(gradients, expected, strict=True):
        assert_close(gradient, value, 2e-5)
