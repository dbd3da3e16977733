"""The operation under JAX's transformations, in bfloat16, over several axes, and out of shape."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from randlora_jax import RandLoraConfig, RandLoraDotGeneral, delta_weight, draw_bases
from randlora_jax.ops.dot_general import prepare_scales

SHAPES = ((13, 22), (22, 13))
R = 5


def normal(*shape):
    rng = np.random.default_rng(math.prod(shape))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def bases():
    return {"randlora_A": normal(R, 1, 24), "randlora_B": normal(26, 5, R)}


def make_scales(in_features, out_features, stack=()):
    small = min(in_features, out_features)
    n = math.ceil(small / R)
    return normal(*stack, R, n), normal(*stack, n, small)


def apply(x, kernel, *scales, strategy="auto", axes=None):
    axes = (x.ndim - 1,) if axes is None else axes
    dot_general = RandLoraDotGeneral(bases(), scales, strategy=strategy)
    return dot_general(x, kernel, ((axes, tuple(range(len(axes)))), ((), ())))


def delta(scales, in_features, out_features):
    A, B = bases()["randlora_A"], bases()["randlora_B"]
    return delta_weight(A, B, *scales, in_features, out_features, 1.0)


def unstack(i, tree):
    return jax.tree.map(lambda a: a[i], tree)


def assert_close(actual, expected, tolerance=2e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        error = np.abs(np.asarray(a, np.float64) - np.asarray(e, np.float64)).max()
        assert error <= tolerance * np.abs(np.asarray(e, np.float64)).max()


@functools.partial(jax.jit, static_argnums=0)
def output_and_gradients(function, *arguments):
    """Of the sum of the output with random weights."""
    y, vjp = jax.vjp(function, *arguments)
    return y, vjp(normal(*y.shape).astype(y.dtype))


def assert_same(one, other, *arguments, tolerance=2e-5):
    """Two functions have the same output and the same gradients, to all arguments."""
    assert_close(
        output_and_gradients(one, *arguments), output_and_gradients(other, *arguments), tolerance
    )


@pytest.fixture(params=["merged", "factored"])
def strategy(request):
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def layer(request):
    """x (tokens, in), kernel and scales"""
    return normal(9, request.param[0]), normal(*request.param), make_scales(*request.param)


def test_vmap_over_inputs_is_one_call_for_each(layer, strategy):
    _, kernel, scales = layer
    one = functools.partial(apply, strategy=strategy)
    mapped = jax.vmap(one, (0, None, None))
    looped = lambda xs, *rest: jnp.stack([one(x, *rest) for x in xs])
    assert_same(mapped, looped, normal(3, 7, kernel.shape[0]), kernel, scales)


def test_vmap_over_kernels_and_scales_is_one_call_for_each(layer, strategy):
    x, kernel, _ = layer
    one = functools.partial(apply, strategy=strategy)
    mapped = jax.vmap(one, (None, 0, 0))
    looped = lambda x, *stack: jnp.stack([one(x, *unstack(i, stack)) for i in range(3)])
    scales = make_scales(*kernel.shape, stack=(3,))
    assert_same(mapped, looped, x, normal(3, *kernel.shape), scales)


@pytest.mark.parametrize("strategy", ["auto", "merged", "factored"])
def test_jit_changes_nothing(layer, strategy):
    one = functools.partial(apply, strategy=strategy)
    assert_close(jax.jit(one)(*layer), one(*layer), 1e-6)


def test_checkpoint_changes_nothing(layer, strategy):
    one = functools.partial(apply, strategy=strategy)
    assert_same(jax.checkpoint(one), one, *layer, tolerance=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_stacked_layers_is_a_loop(strategy, remat):
    one = functools.partial(apply, strategy=strategy)
    one = jax.checkpoint(one) if remat else one

    def scanned(x, *stack):
        return lax.scan(lambda x, layer: (jnp.tanh(one(x, *layer)), None), x, stack)[0]

    def looped(x, *stack):
        for i in range(4):
            x = jnp.tanh(one(x, *unstack(i, stack)))
        return x

    kernels, scales = normal(4, 17, 17) / 4, make_scales(17, 17, stack=(4,))
    assert_same(scanned, looped, normal(6, 17), kernels, scales, tolerance=1e-4)


def test_gradient_of_the_kernel_is_inputs_times_outputs(layer, strategy):
    x, kernel, scales = layer
    dy = normal(9, kernel.shape[1])
    _, vjp = jax.vjp(lambda kernel: apply(x, kernel, scales, strategy=strategy), kernel)
    assert_close(vjp(dy)[0], x.T @ dy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scales_of_several_adapters_add_their_updates(shape, strategy):
    x, kernel, one = normal(9, shape[0]), normal(*shape), make_scales(*shape)
    other = tuple(jnp.flip(s) for s in one)
    adapted = functools.partial(apply, strategy=strategy)
    summed = lambda x, kernel, *each: x @ (kernel + sum(delta(s, *shape) for s in each))
    assert_same(adapted, summed, x, kernel, one, other)


@pytest.mark.parametrize("mode", ["sparse", "very_sparse"])
def test_ternary_bases_count_as_their_signs_times_their_scale(mode, strategy):
    ternary = draw_bases(RandLoraConfig(r=R, **{mode: True}), 26, 24)
    scales, x, kernel = make_scales(13, 22), normal(9, 13), normal(13, 22)
    adapted = RandLoraDotGeneral(
        ternary, (prepare_scales(ternary, scales, 0.5),), strategy=strategy
    )
    A, B = (
        ternary[f"randlora_{name}"].astype(jnp.float32) * size
        for name, size in zip("AB", ternary["randlora_scale"], strict=True)
    )
    expected = x @ (kernel + delta_weight(A, B, *scales, 13, 22, 0.5))
    assert_close(adapted(x, kernel, (((1,), (0,)), ((), ()))), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_scales_are_good_to_a_hundredth_in_bfloat16(shape, strategy):
    x, kernel, scales = normal(64, shape[0]), normal(*shape), make_scales(*shape)
    function = lambda *arrays: (
        lambda scales: apply(*arrays, scales, strategy=strategy).astype(jnp.float32)
    )
    low = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    wide = [a.astype(jnp.float32) for a in low]
    for a, e in zip(
        jax.tree.leaves(output_and_gradients(function(*low), scales)[1]),
        jax.tree.leaves(output_and_gradients(function(*wide), scales)[1]),
        strict=True,
    ):
        assert a.dtype == jnp.float32
        assert jnp.linalg.norm(a - e) < 1e-2 * jnp.linalg.norm(e)


@pytest.mark.parametrize(
    "x_shape, kernel_shape, axes",
    [
        ((7, 3, 4), (3, 4, 2, 5), (1, 2)),
        ((3, 7, 4, 2), (3, 4, 9), (0, 2)),
        ((4, 7, 3), (3, 4, 5), (2, 0)),
        ((5, 2, 3, 4), (4, 3, 2, 2, 3, 4), (3, 2, 1)),
        ((13, 6), (13, 22), (0,)),
        ((13,), (13, 22), (0,)),
    ],
    ids=str,
)
def test_several_axes_in_any_place_are_contracted(x_shape, kernel_shape, axes, strategy):
    x, kernel, inputs = normal(*x_shape), normal(*kernel_shape), len(axes)
    sides = math.prod(kernel_shape[:inputs]), math.prod(kernel_shape[inputs:])
    scales = make_scales(*sides)

    def expected(x, kernel, scales):
        kernel = kernel + delta(scales, *sides).reshape(kernel_shape)
        return lax.dot_general(x, kernel, ((axes, tuple(range(inputs))), ((), ())))

    adapted = functools.partial(apply, strategy=strategy, axes=axes)
    assert_same(adapted, expected, x, kernel, scales)


def test_forward_mode_says_that_there_is_none(layer):
    with pytest.raises(TypeError, match=r"forward-mode .*custom_vjp"):
        jax.jvp(lambda x: apply(x, *layer[1:]), layer[:1], layer[:1])


@pytest.mark.parametrize(
    "dimension_numbers", [(((1,), (1,)), ((), ())), (((1,), (0,)), ((0,), (1,)))]
)
def test_kernels_with_other_axes_first_are_refused(dimension_numbers):
    dot_general = RandLoraDotGeneral(bases(), (make_scales(17, 17),))
    with pytest.raises(ValueError, match=r"dimension_numbers=.*batch axes first"):
        dot_general(normal(17, 17), normal(17, 17), dimension_numbers)


@pytest.mark.parametrize(
    "lam, gamma, message",
    [
        ((5, 4), (3, 13), r"randlora_lambda has shape \(5, 4\).*13 x 22.*r=5 needs \(5, 3\)"),
        ((4, 3), (3, 13), r"randlora_lambda has shape \(4, 3\).*needs \(5, 3\)"),
        ((5, 3), (3, 22), r"randlora_gamma has shape \(3, 22\).*needs \(3, 13\)"),
        ((5, 3), (13, 3), r"randlora_gamma has shape \(13, 3\).*needs \(3, 13\)"),
    ],
)
def test_scales_that_do_not_fit_are_refused(lam, gamma, message):
    with pytest.raises(ValueError, match=message):
        delta((normal(*lam), normal(*gamma)), 13, 22)


@pytest.mark.parametrize("sides", [(13, 27), (25, 25), (27, 13)])
def test_bases_that_are_too_small_are_refused(sides):
    with pytest.raises(
        ValueError, match=rf"bases .*\(5, 1, 24\).*too small.*{sides[0]} x {sides[1]}"
    ):
        delta(make_scales(*sides), *sides)


def test_the_operation_itself_refuses_scales_that_do_not_fit():
    with pytest.raises(ValueError, match=r"randlora_gamma has shape \(3, 22\).*needs \(3, 13\)"):
        apply(normal(9, 13), normal(13, 22), (normal(5, 3), normal(3, 22)))
