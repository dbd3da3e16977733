"""What an adapter adds to what devices exchange, in the layouts that people use, where it is put.

The frozen model's own collectives are taken away: those of its forward pass and of the gradient of
its input. What is left must be the sum of the scales' gradients, and nothing may be gathered more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import RandLoraParam, inject, set_layout
from tests import pods
from tests.compiling import shipped_jit

CONFIG = rl.RandLoraConfig(r=16, randlora_alpha=16, target_modules="all-linear")
# Where a residual stream is divided by what divides the kernels too, one of them has to move, and a
# full sum may take the place of a gather and a smaller one: the gathers are compared.
EXACT = ("data", "fsdp", "tensor", "2x2x2", "tokens", "residual", "hidden")


@functools.cache
def of_base(name, dtype=jnp.float32):
    layout = pods.LAYOUTS[name]
    mesh, net = layout.devices(), pods.Net(layout)
    params, x = pods.placed_params(layout, mesh, dtype=dtype), pods.batch(layout, mesh, dtype)
    step = jax.value_and_grad(lambda x, params: pods.loss(net.apply({"params": params}, x)))
    with jax.set_mesh(mesh):
        return pods.exchanged(shipped_jit(step).lower(x, params).compile())


def linen_step(layout, mesh, params, x, config, told, **options):
    """(compiled step, bytes of the scales) of a model that is placed as its user would do it."""
    model = RandLora(pods.Net(layout), config, **options)
    with jax.set_mesh(mesh):
        variables = model.adapt({"params": params}, x)
        if told:
            model = model.with_layout(variables, x)
        trainable, frozen = rl.split(variables, config)

        def step(trainable, x, frozen, key):
            given = {"rngs": {"dropout": key}} if options.get("deterministic") is False else {}
            value = lambda t, x: pods.loss(model.apply(rl.combine(t, frozen), x, **given))
            return jax.value_and_grad(value, (0, 1))(trainable, x)

        arrays = trainable, x, frozen, jax.random.key(0)
        compiled = shipped_jit(step).lower(*arrays).compile()
    return compiled, sum(a.nbytes for a in jax.tree.leaves(trainable))


def assert_only_scales(ours, base, scales, layout):
    gathers = ("all-gather", "all-to-all", "collective-permute")
    moved = lambda total: sum(total[kind] for kind in gathers)
    assert moved(ours) <= moved(base) + scales
    if layout in EXACT:
        assert sum(ours.values()) <= sum(base.values()) + 1.05 * scales


# What the compiler makes of the layouts without constraints, `test_communication.py` has too.
BY_COMPILER = ["fsdp", "tokens", "sequence", "data + sequence", "residual", "norm"]


@pytest.mark.parametrize(
    "name, told", [*((n, True) for n in pods.LAYOUTS), *((n, False) for n in BY_COMPILER)]
)
def test_devices_exchange_the_scales_gradients_alone(name, told):
    layout = pods.LAYOUTS[name]
    mesh = layout.devices()
    params, x = pods.placed_params(layout, mesh), pods.batch(layout, mesh)
    compiled, scales = linen_step(layout, mesh, params, x, CONFIG, told)
    ours, base = pods.exchanged(compiled), of_base(name)
    assert_only_scales(ours, base, scales, name)
    if told:  # then it is as exact where the compiler would have had to choose
        assert sum(ours.values()) <= sum(base.values()) + 1.05 * scales


VARIANTS = {
    "dropout": {"config": CONFIG.replace(randlora_dropout=0.1), "deterministic": False},
    "int8 bases": {"config": CONFIG.replace(sparse=True)},
    "bfloat16": {"bases_dtype": jnp.bfloat16},
    "two adapters": {"config": {"a": CONFIG, "b": CONFIG.replace(randlora_alpha=4)}},
    "factored": {"strategy": "factored"},
    "merged": {"strategy": "merged"},
}


# The compiler is asked too where there are other operands.
TOLD = [*((v, True) for v in VARIANTS), ("dropout", False), ("two adapters", False)]


@pytest.mark.parametrize("variant, told", TOLD)
def test_so_do_they_in_other_ways_of_training(variant, told):
    layout = pods.LAYOUTS["2x2x2"]
    mesh = layout.devices()
    options = {"config": CONFIG, **VARIANTS[variant]}
    dtype = options.get("bases_dtype", jnp.float32)
    params, x = pods.placed_params(layout, mesh, dtype=dtype), pods.batch(layout, mesh, dtype)
    with jax.numpy_dtype_promotion("standard" if dtype == jnp.bfloat16 else "strict"):  # RMSNorm
        compiled, scales = linen_step(layout, mesh, params, x, told=told, **options)
        base = of_base("2x2x2", dtype)
    assert_only_scales(pods.exchanged(compiled), base, scales, "2x2x2")


@pytest.mark.parametrize("told", [False, True], ids=["by the compiler", "by the user"])
@pytest.mark.parametrize("name", ["tensor", "2x2x2"])
def test_so_do_they_in_nnx(name, told):
    layout = pods.LAYOUTS[name]
    mesh = layout.devices()
    x = pods.batch(layout, mesh)

    def compiled(model, wrt):
        @nnx.jit
        def step(model, x):
            value = lambda model, x: pods.loss(model(x))
            return nnx.value_and_grad(value, argnums=wrt)(model, x)

        return step.lower(model, x).compile()

    with jax.set_mesh(mesh):
        make = lambda: pods.NnxNet(layout, nnx.Rngs(0))
        base = pods.exchanged(compiled(make(), 1))
        model = inject(make(), CONFIG)
        if told:
            set_layout(model, x)
        ours = pods.exchanged(compiled(model, (nnx.DiffState(0, RandLoraParam), 1)))
    scales = sum(a.nbytes for a in jax.tree.leaves(nnx.state(model, RandLoraParam)))
    assert_only_scales(ours, base, scales, name)


@pytest.mark.parametrize("told", [False, True], ids=["by the compiler", "by the user"])
@pytest.mark.parametrize("name", ["data + sequence", "2x2x2"])
def test_numbers_are_those_of_one_device(name, told):
    layout = pods.LAYOUTS[name]
    mesh = layout.devices()
    params, x = pods.placed_params(layout, mesh), pods.batch(layout, mesh)
    model, alone = RandLora(pods.Net(layout), CONFIG), RandLora(pods.Net(pods.Layout({})), CONFIG)
    with jax.set_mesh(mesh):
        variables = model.adapt({"params": params}, x)
    noise = lambda path, a: a + 0.05 * jax.random.normal(jax.random.key(len(str(path))), a.shape)
    scales = jax.tree_util.tree_map_with_path(noise, variables["randlora"])
    variables = jax.device_put({**variables, "randlora": scales}, rl.sharding(variables, CONFIG))
    if told:
        model = model.with_layout(variables, x)

    def step(model, variables, x):
        value = lambda scales: pods.loss(model.apply({**variables, "randlora": scales}, x))
        return jax.value_and_grad(value)(variables["randlora"])

    with jax.set_mesh(mesh):
        got = shipped_jit(lambda v, x: step(model, v, x))(variables, x)
    host = jax.tree.map(np.asarray, (variables, x))
    expected = shipped_jit(lambda v, x: step(alone, v, x))(*host)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


def test_explicit_axes_follow_what_a_layer_wants_of_its_result():
    """Sequence parallelism by types: x is divided by "model" where the result is to be."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
    layer = nnx.Linear(64, 256, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel.set_value(put(layer.kernel.get_value(), "data", "model"))
    x = put(jnp.ones((16, 32, 64)), "data", "model", None)
    wanted = jax.sharding.PartitionSpec("data", None, "model")

    def step(layer, x):
        return jax.value_and_grad(lambda x: pods.loss(layer(x, out_sharding=wanted)))(x)

    with jax.set_mesh(mesh):
        base = pods.exchanged(nnx.jit(step).lower(layer, x).compile())
        inject(layer, CONFIG)
        ours = pods.exchanged(nnx.jit(step).lower(layer, x).compile())
    assert ours["all-gather"] <= base["all-gather"]
