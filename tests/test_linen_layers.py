"""Every kind of layer: its base stays as it is, and it computes with W + dW, gradients included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from randlora_jax import RandLoraConfig, register_layer
from randlora_jax.linen import RandLora
from tests import linen_cases
from tests.linen_cases import (
    Case,
    R,
    assert_close,
    assert_same_bits,
    normal,
)
from tests.linen_models import PLAIN, Conv1D, GemmaEinsum, PlainEinsum


class LoudDense(nn.Dense):
    """A subclass that calls its super."""

    @nn.compact
    def __call__(self, x):
        return jnp.tanh(super().__call__(2 * x))


class OwnDense(nn.Dense):
    """A subclass that ignores its attribute `dot_general`."""

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        return jnp.sin(x @ kernel)


class Gated(nn.Module):
    """A raw parameter that belongs to no layer: (gates, features, in)."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("gating", nn.initializers.normal(), (2, 3, x.shape[-1]))
        gate, up = jnp.einsum("bi,goi->gbo", x, kernel)
        return nn.gelu(gate) * up


def doubled(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, **options):
    """A user's own product: not the plain one, so that leaving it out shows."""
    y = lax.dot_general(lhs, rhs, dimension_numbers, precision, preferred_element_type, **options)
    return 2 * y


def attention_kernels():
    kernels = {f"{name}/kernel": ((0,), ()) for name in ("query", "key", "value")}
    return {**kernels, "out/kernel": ((0, 1), ())}


bias = nn.initializers.normal()
CASES = {
    "Dense, in < out": Case(nn.Dense(7, bias_init=bias), (normal(0, 4, 5),), PLAIN),
    "Dense, out < in": Case(nn.Dense(5, bias_init=bias), (normal(0, 4, 7),), PLAIN),
    "Dense, square": Case(nn.Dense(5, bias_init=bias), (normal(0, 4, 5),), PLAIN),
    "Dense, one output": Case(nn.Dense(1, bias_init=bias), (normal(0, 4, 7),), PLAIN),
    "Dense on one axis alone": Case(nn.Dense(7), (normal(0, 5),), PLAIN),
    "DenseGeneral, several inputs": Case(
        nn.DenseGeneral(6, axis=(-2, -1), bias_init=bias),
        (normal(0, 2, 5, 3),),
        {"kernel": ((0, 1), ())},
    ),
    "DenseGeneral, several outputs": Case(
        nn.DenseGeneral((3, 5), bias_init=bias), (normal(0, 2, 3, 6),), PLAIN
    ),
    "DenseGeneral, several of both": Case(
        nn.DenseGeneral((3, 2), axis=(-2, -1)), (normal(0, 2, 5, 3),), {"kernel": ((0, 1), ())}
    ),
    "DenseGeneral, an axis before the last": Case(
        nn.DenseGeneral((2, 3), axis=1, bias_init=bias), (normal(0, 2, 15, 4),), PLAIN
    ),
    "DenseGeneral, axes apart": Case(
        nn.DenseGeneral(15, axis=(0, 2)), (normal(0, 2, 5, 3),), {"kernel": ((0, 1), ())}
    ),
    "MultiHeadDotProductAttention": Case(
        nn.MultiHeadDotProductAttention(3, qkv_features=6, out_features=7),
        (normal(0, 2, 4, 5), normal(1, 2, 3, 15)),
        attention_kernels(),
    ),
    "Einsum, equation in the constructor": Case(
        nn.Einsum((15, 2, 3), "btd,dnh->btnh", bias_init=bias), (normal(0, 2, 4, 15),), PLAIN
    ),
    "Einsum, equation in the call": Case(
        nn.Einsum((2, 3, 15), use_bias=False),
        (normal(0, 4, 2, 3),),
        {"kernel": ((0, 1), ())},
        after=("tnh,nhd->td",),
    ),
    "Einsum, kernel (out, in)": Case(
        nn.Einsum((7, 5), "...i,oi->...o", use_bias=False),
        (normal(0, 4, 5),),
        {"kernel": ((1,), ())},
    ),
    "Einsum, few tokens": Case(
        nn.Einsum((15, 2, 6), "btd,dnh->btnh", bias_init=bias), (normal(0, 1, 2, 15),), PLAIN
    ),
    "a plain Einsum, few tokens": Case(
        PlainEinsum((2, 15, 8)),
        (normal(0, 1, 2, 15),),
        {"w": ((1,), ())},
        before=("btd,ndh->btnh",),
    ),
    "a plain Einsum that puts its result in another order": Case(
        PlainEinsum((15, 9)), (normal(0, 1, 2, 15),), {"w": ((0,), ())}, before=("btd,dh->hbt",)
    ),
    "a registered Einsum, inputs in the middle": Case(
        GemmaEinsum((2, 15, 3)),
        (normal(0, 2, 4, 15),),
        {"w": ((1,), ())},
        before=("btd,ndh->btnh",),
    ),
    "a registered Einsum, inputs first and last": Case(
        GemmaEinsum((2, 15, 3)),
        (normal(0, 4, 2, 3),),
        {"w": ((0, 2), ())},
        before=("tnh,ndh->td",),
    ),
    "a raw parameter": Case(
        Gated(),
        (normal(0, 4, 15),),
        {"gating": ((2,), ())},
        parameters={"gating": (2,)},
        config={"target_modules": "gating"},
    ),
    "fan_in_fan_out": Case(
        Conv1D(7), (normal(0, 4, 5),), {"kernel": ((1,), ())}, config={"fan_in_fan_out": True}
    ),
    "a subclass that calls its super": Case(LoudDense(7), (normal(0, 4, 5),), PLAIN),
    "a subclass that ignores dot_general": Case(OwnDense(7), (normal(0, 4, 5),), PLAIN),
}


# For each case below.
test_the_base_has_the_paths_and_initial_values_of_the_unwrapped_model = (
    linen_cases.test_the_base_has_the_paths_and_initial_values_of_the_unwrapped_model
)
test_output_is_bit_identical_before_training = (
    linen_cases.test_output_is_bit_identical_before_training
)
test_output_is_that_of_kernel_plus_update = linen_cases.test_output_is_that_of_kernel_plus_update
test_gradients_are_those_of_kernel_plus_update = (
    linen_cases.test_gradients_are_those_of_kernel_plus_update
)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_merging_gives_the_same_output(case):
    params = case.model.merge(case.trained, *case.args)
    y = case.base.apply({"params": params}, *case.args)
    assert_close(np.asarray(y, np.float64), case.expected[0], case.tolerance)


@pytest.mark.parametrize("door", ["dot_general", "dot_general_cls"])
def test_the_layers_own_dot_general_computes_the_frozen_product(door):
    own = doubled if door == "dot_general" else lambda: doubled
    x = normal(0, 4, 5)
    plain, base = Case(nn.Dense(7), (x,), PLAIN), Case(nn.Dense(7, **{door: own}), (x,), PLAIN)
    assert_same_bits(base.variables, plain.variables)
    before = base.model.apply(base.variables, x)
    assert_same_bits(before, 2 * nn.Dense(7).apply(base.base_variables, x))
    W = np.asarray(plain.trained["params"]["kernel"], np.float64)
    y = plain.expected[0] + np.asarray(x, np.float64) @ W
    assert_close(base.actual[0], y, base.tolerance)


def test_a_dense_layer_is_a_matrix_product_in_numpy():
    case = CASES["Dense, in < out"]
    params, scales, bases = (
        {k: np.asarray(v, np.float64) for k, v in case.trained[c].items()}
        for c in ("params", "randlora", "randlora_bases")
    )
    update = np.zeros((5, 7))
    for row in range(2 * R):  # row of U and column of B, as they are flattened: n = 2
        k, b = row // 2, row % 2
        lam, gamma = scales["randlora_lambda"][k, b], scales["randlora_gamma"][b]
        column = bases["randlora_B"][:, row // R, row % R]
        update += np.outer(lam * bases["randlora_A"][k, 0] * gamma, column)
    scaling = 2 / R
    y = np.asarray(case.arrays[0], np.float64) @ (params["kernel"] + scaling * update)
    assert_close(case.actual[0], y + params["bias"], case.tolerance)


def test_scales_of_a_subclass_need_no_registration_of_their_own():
    assert set(CASES["a subclass that calls its super"].variables["randlora"]) == {
        "randlora_lambda",
        "randlora_gamma",
    }


def test_an_equation_that_is_no_linear_map_raises_and_names_it():
    base = nn.Einsum((5, 3), "bi,ij->b", use_bias=False)
    model = RandLora(base, RandLoraConfig(r=R, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"bi,ij->b.*exclude_modules"):
        model.init(jax.random.key(0), normal(0, 4, 5))


def test_a_registered_function_says_which_axes_are_inputs():
    class Backwards(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("matrix", nn.initializers.normal(), (7, 5))
            return x @ w.T

    register_layer(Backwards, kernel="matrix", input_axes=lambda *_: (1,))
    case = Case(Backwards(), (normal(0, 4, 5),), {"matrix": ((1,), ())})
    assert_close(case.actual, case.expected, case.tolerance)


def test_fan_in_fan_out_without_a_kernel_stored_so_warns():
    config = RandLoraConfig(r=R, target_modules="all-linear", fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out=True has no effect"):
        RandLora(nn.Dense(7), config).init(jax.random.key(0), normal(0, 4, 5))


@pytest.mark.parametrize("strategy", ["merged", "factored"])
@pytest.mark.parametrize("name", ["MultiHeadDotProductAttention", "DenseGeneral, several of both"])
def test_a_forced_strategy_gives_the_same_output(name, strategy):
    case = CASES[name]
    y = case.model.clone(strategy=strategy).apply(case.trained, *case.args)
    assert_close(np.asarray(y, np.float64), case.expected[0], case.tolerance)
