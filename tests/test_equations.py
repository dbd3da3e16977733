"""Einsum equations of every kind: what their axes are, and that layers compute with W + dW."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import randlora_jax as rl
from randlora_jax import equations
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora
from tests.linen_cases import assert_close, normal, randomised
from tests.linen_models import PlainEinsum

CONFIG = rl.RandLoraConfig(r=2, randlora_alpha=2.0, target_modules="all-linear")
LETTERS = "abcdefgh"


@st.composite
def products(draw, most=2):
    """(equation, x's shape, the kernel's shape, what its axes are)."""
    counts = draw(
        st.tuples(
            st.integers(0, most), st.integers(1, most), st.integers(1, most), st.integers(0, 2)
        )
    )
    letters = iter(draw(st.permutations(LETTERS)))
    stacked, inputs, outputs, tokens = ([next(letters) for _ in range(n)] for n in counts)
    order = lambda *groups: draw(st.permutations([c for group in groups for c in group]))
    x, kernel = order(stacked, inputs, tokens), order(stacked, inputs, outputs)
    result, size = order(stacked, tokens, outputs), {c: draw(st.integers(1, 4)) for c in LETTERS}
    equation = f"{''.join(x)},{''.join(kernel)}->{''.join(result)}"
    at = lambda names: tuple(i for i, c in enumerate(kernel) if c in names)
    shapes = (tuple(size[c] for c in operand) for operand in (x, kernel))
    return equation, *shapes, equations.KernelAxes(at(stacked), at(inputs))


@given(products())
def test_an_equation_is_a_dot_general_and_a_transpose(product):
    equation, x_shape, kernel_shape, axes = product
    assert equations.kernel_axes(equation, kernel_shape) == axes
    found = equations.product_of(equation, x_shape, kernel_shape, axes)
    x, W = (np.arange(np.prod(s), dtype=np.float32).reshape(s) % 7 for s in (x_shape, kernel_shape))
    y = lax.dot_general(x, W, ((found.contract, axes.inputs), (found.batch, axes.stacked)))
    np.testing.assert_array_equal(jnp.transpose(y, found.order), np.einsum(equation, x, W))
    again = equations.equation_for(axes, len(kernel_shape))
    assert equations.kernel_axes(again, kernel_shape) == axes


@given(products(), st.sampled_from(["auto", "merged", "factored"]))
@settings(max_examples=9, deadline=None)
def test_layers_of_every_equation_apply_as_they_merge(product, strategy):
    equation, x_shape, kernel_shape, axes = product
    x, base = normal(0, *x_shape), PlainEinsum(kernel_shape)
    model = RandLora(base, CONFIG, strategy=strategy)
    variables = model.adapt(base.init({"params": KEY}, equation, x), equation, x)
    (label,) = variables["randlora"]
    assert rl.peft.names.parse_label((label,))[1] == axes
    start = model.apply(variables, equation, x)
    # An einsum of axes in another order than the product's may sum in another one.
    alone = base.apply({"params": variables["params"]}, equation, x)
    assert_close(np.asarray(start), np.asarray(alone), 1e-6)
    variables = {**variables, "randlora": randomised(variables["randlora"])}
    y = model.apply(variables, equation, x)
    merged = base.apply({"params": rl.merge(variables, CONFIG)}, equation, x)
    assert_close(np.asarray(y), np.asarray(merged), 1e-5)


@given(products(), st.sampled_from(["auto", "merged", "factored"]))
@settings(max_examples=6, deadline=None)
def test_the_same_in_nnx(product, strategy):
    equation, x_shape, kernel_shape, _ = product
    x = normal(0, *x_shape)
    make = lambda: nnx.Einsum(equation, kernel_shape, rngs=nnx.Rngs(0))
    model = rx.inject(make(), CONFIG, strategy=strategy)
    # An einsum of axes in another order than the product's may sum in another one.
    assert_close(np.asarray(model(x)), np.asarray(make()(x)), 1e-6)
    values = rx.variables(model)
    rx.update(model, {**values, "randlora": randomised(values["randlora"])})
    y = np.asarray(model(x))
    assert_close(y, np.asarray(rx.merge(model)(x)), 1e-5)


@pytest.mark.parametrize("equation", ["ab,bc->a", "ab,cd->abcd", "ab,ab->ab"])
def test_what_is_no_matrix_is_refused(equation):
    _, kernel = equation.split("->")[0].split(",")
    with pytest.raises(ValueError, match="no linear map"):
        equations.kernel_axes(equation, (2,) * len(kernel))


@pytest.mark.parametrize("equation", ["ab,bc->c", "aab,bc->ac", "adb,bc->ac", "ab,bcc->ac"])
def test_what_is_more_than_a_product_is_none(equation):
    x, kernel = equation.split("->")[0].split(",")
    shapes = (2,) * len(x), (2,) * len(kernel)
    axes = equations.kernel_axes(equation, shapes[1])
    assert equations.product_of(equation, *shapes, axes) is None


KEY = np.array([0, 1], np.uint32)


def test_other_sums_are_left_to_the_layer():
    """A sum over tokens is none of a matrix: the layer runs on W + dW."""

    class Sums(nn.Module):
        @nn.compact
        def __call__(self, equation, x):
            return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), (5, 3)))

    rl.register_layer(Sums, "w", plain=True)
    x = normal(0, 4, 5)
    model = RandLora(Sums(), CONFIG)
    variables = model.init(KEY, "ab,bc->c", x)
    variables = {**variables, "randlora": randomised(variables["randlora"])}
    merged = Sums().apply({"params": rl.merge(variables, CONFIG)}, "ab,bc->c", x)
    assert_close(np.asarray(model.apply(variables, "ab,bc->c", x)), np.asarray(merged), 1e-5)
