"""How many operations the compiler is left with: exact counts, no clocks."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from randlora_jax import RandLoraConfig, RandLoraDotGeneral
from randlora_jax.linen import RandLora
from randlora_jax.ops import Dropout
from tests.compiling import shipped_jit

# tokens, in, out, r: few to many tokens for each orientation.
GRID = [
    (32, 256, 256, 8),
    (32, 1024, 256, 8),
    (32, 256, 1024, 32),
    (128, 512, 512, 32),
    (128, 256, 1024, 8),
    (512, 512, 512, 8),
    (512, 1024, 256, 32),
    (512, 256, 1024, 32),
    (2048, 256, 256, 32),
    (2048, 1024, 256, 8),
    (4096, 256, 1024, 8),
    (4096, 512, 512, 32),
    (4096, 1024, 256, 32),
    (32, 4096, 1024, 8),
    (256, 1024, 4096, 64),
    (1024, 4096, 4096, 64),
    (16384, 256, 4096, 16),
    (16384, 4096, 4096, 64),
    (16384, 4096, 256, 8),
]


def flops(tokens, in_features, out_features, r, strategy="auto", train_kernel=False):
    """Of a step's value and gradients to the scales and the input of one adapted layer."""
    config = RandLoraConfig(r=r, target_modules="all-linear")
    model = RandLora(nn.Dense(out_features, use_bias=False), config, strategy=strategy)
    x = jax.ShapeDtypeStruct((tokens, in_features), jnp.float32)
    probe = jax.ShapeDtypeStruct((tokens, out_features), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(scales, x, params, rest, probe):
        return jnp.sum(model.apply(rest | {"randlora": scales, "params": params}, x) * probe)

    step = shipped_jit(jax.value_and_grad(loss, argnums=(0, 1, 2) if train_kernel else (0, 1)))
    lowered = step.lower(rest["randlora"], x, params, rest, probe)
    return lowered.compile().cost_analysis()["flops"]


def sides(tokens, in_features, out_features, r):
    d, D = sorted((in_features, out_features))
    return tokens, d, D, r * math.ceil(d / r)


def factored(*point):
    T, d, D, m = sides(*point)
    return 4 * T * d * D + 2 * T * m * (d + D) + 2 * T * m * (2 * d + D)


def merged(*point):
    T, d, D, m = sides(*point)
    return 6 * T * d * D + 6 * D * m * d


@pytest.mark.parametrize("point", GRID, ids=str)
def test_a_step_costs_no_more_than_the_cheaper_way(point):
    assert flops(*point) <= 1.05 * min(factored(*point), merged(*point))


def test_the_grid_holds_points_where_either_way_is_cheaper():
    cheaper = {factored(*point) < merged(*point) for point in GRID}
    assert cheaper == {False, True}


def full_fine_tuning(tokens, in_features, out_features):
    """Of the plain layer's value and gradients to its kernel and input."""
    dense = nn.Dense(out_features, use_bias=False)
    x = jax.ShapeDtypeStruct((tokens, in_features), jnp.float32)
    probe = jax.ShapeDtypeStruct((tokens, out_features), jnp.float32)
    params = jax.eval_shape(dense.init, jax.random.key(0), x)
    loss = lambda params, x, probe: jnp.sum(dense.apply(params, x) * probe)
    lowered = shipped_jit(jax.value_and_grad(loss, (0, 1))).lower(params, x, probe)
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize("r", [8, 64])
@pytest.mark.parametrize("sizes", [(256, 1024), (1024, 256), (512, 512), (256, 256)], ids=str)
@pytest.mark.parametrize("times", [8, 16])
def test_long_batches_cost_what_full_fine_tuning_costs(times, sizes, r):
    tokens = times * sizes[0]
    assert flops(tokens, *sizes, r) <= 1.15 * full_fine_tuning(tokens, *sizes)


@pytest.mark.parametrize(
    "tokens, sizes", [(358, (512, 512)), (180, (256, 256)), (280, (256, 1024))]
)
def test_forward_and_backward_each_take_their_cheaper_way(tokens, sizes):
    T, d, D, m = sides(tokens, *sizes, 32)
    forward = 2 * T * d * D + min(2 * T * m * (d + D), 2 * D * m * d)
    backward = min(2 * T * d * D + 2 * T * m * (2 * d + D), 4 * T * d * D + 4 * D * m * d)
    assert forward + backward < 0.99 * min(factored(tokens, *sizes, 32), merged(tokens, *sizes, 32))
    assert flops(tokens, *sizes, 32) <= 1.04 * (forward + backward)


@pytest.mark.parametrize("formula", [factored, merged])
@pytest.mark.parametrize("sizes", [(256, 1024), (1024, 256), (512, 512)], ids=str)
def test_a_forced_strategy_costs_what_its_formula_says(formula, sizes):
    point = (384, *sizes, 32)
    count = flops(*point, strategy=formula.__name__)
    assert 0.99 * formula(*point) < count < 1.05 * formula(*point)


@pytest.mark.parametrize("sizes", [(256, 1024), (1024, 256)], ids=str)
def test_no_gradient_of_a_frozen_kernel_is_computed(sizes):
    point = (128, *sizes, 32)
    kernel_gradient = 2 * math.prod(point[:3])
    frozen = flops(*point, strategy="factored")
    trained = flops(*point, strategy="factored", train_kernel=True)
    assert trained - frozen > 0.99 * kernel_gradient


@pytest.mark.parametrize(
    "equation, shape", [("td,dnh->tnh", (128, 4, 64)), ("td,hd->th", (256, 96))]
)
@pytest.mark.parametrize("tokens", [32, 64, 4096])
def test_an_einsum_layer_costs_no_more_than_the_cheaper_way(tokens, equation, shape):
    ins, outs = (shape[0], 256) if len(shape) == 3 else (96, 256)
    config = RandLoraConfig(r=16, target_modules="all-linear")
    model = RandLora(nn.Einsum(shape, equation, use_bias=False), config)
    x = jax.ShapeDtypeStruct((tokens, ins), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params, rest = {"params": variables["params"]}, variables["randlora_bases"]

    def loss(scales, x, params, rest):
        y = model.apply({**params, "randlora": scales, "randlora_bases": rest}, x)
        return jnp.sum(jnp.square(y))

    lowered = shipped_jit(jax.value_and_grad(loss, (0, 1))).lower(
        variables["randlora"], x, params, rest
    )
    point = (tokens, ins, outs, 16)
    squares = 4 * tokens * outs
    count = lowered.compile().cost_analysis()["flops"] - squares
    assert count <= 1.05 * min(factored(*point), merged(*point))


@pytest.mark.parametrize("sizes", [(256, 1024), (1024, 256), (512, 512)], ids=str)
@pytest.mark.parametrize("tokens", [32, 512, 8192])
def test_dropout_takes_the_cheaper_way_beside_the_frozen_product(tokens, sizes):
    T, d, D, m = sides(tokens, *sizes, 32)
    n = math.ceil(d / 32)
    shapes = {
        "x": (tokens, sizes[0]), "mask": (tokens, sizes[0]), "kernel": sizes,
        "probe": (tokens, sizes[1]), "A": (32, 1, d), "B": (D, n, 32), "lam": (32, n),
        "gamma": (n, d),
    }  # fmt: skip
    given = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    def loss(scales, x, mask, kernel, A, B, probe):
        bases = {"randlora_A": A, "randlora_B": B}
        operation = RandLoraDotGeneral(bases, [scales], [Dropout(0.5, lambda x: x * mask)])
        return jnp.sum(operation(x, kernel, (((1,), (0,)), ((), ()))) * probe)

    scales, x = (given.pop("lam"), given.pop("gamma")), given.pop("x")
    order = [given[name] for name in ("mask", "kernel", "A", "B", "probe")]
    lowered = shipped_jit(jax.value_and_grad(loss, (0, 1))).lower(scales, x, *order)
    beside = {
        "factored": 2 * T * m * (d + D) + 2 * T * m * (2 * d + D),
        "merged": 6 * T * d * D + 6 * D * m * d,
    }
    assert lowered.compile().cost_analysis()["flops"] <= 1.05 * (
        4 * T * d * D + min(beside.values())
    )
