"""Bases that are divided among devices, where `rl.sharding(..., bases_axes=...)` places them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import inject, set_layout, update, variables
from tests import pods
from tests.compiling import shipped_jit
from tests.placing import put
from tests.test_communication import CONFIG, Stack, placed, single_device

WAYS = ["by the compiler", "by the user", "by types"]


def step(model):
    def loss(trainable, frozen, x):
        return jnp.mean(model.apply(rl.combine(trainable, frozen), x) ** 2)

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_are_divided_alike_fetch_none_of_them(way):
    kind = AxisType.Explicit if way == "by types" else AxisType.Auto
    mesh, trainable, frozen, x = placed("tensor", kind)
    compiled = {}
    for axes in ((), ("model",)):
        given = rl.combine(trainable, frozen)
        given = jax.device_put(given, rl.sharding(given, CONFIG, mesh, bases_axes=axes))
        model = RandLora(Stack(), CONFIG)
        model = model.with_layout(given, x) if way == "by the user" else model
        arrays = (*rl.split(given, CONFIG), x)
        with jax.set_mesh(mesh):
            compiled[axes] = shipped_jit(step(model)).lower(*arrays).compile()
    result = compiled["model",](*arrays)
    B = arrays[1]["randlora_bases"]["randlora_B"]
    assert B.addressable_shards[0].data.nbytes == B.nbytes / 2
    assert pods.exchanged(compiled["model",]) == pods.exchanged(compiled[()])
    for got, wanted in zip(
        jax.tree.leaves(result), jax.tree.leaves(single_device()[2]), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(abs(wanted).max()))


@pytest.mark.parametrize("told", [False, True], ids=WAYS[:2])
def test_other_layers_fetch_the_rows_that_they_read(told):
    """Of the block's layers that is `o`; parts of q, k and v pass from neighbour to neighbour."""
    layout = pods.LAYOUTS["tensor"]
    mesh, config = layout.devices(), CONFIG.replace(r=16)
    params, x = pods.placed_params(layout, mesh), pods.batch(layout, mesh)
    moved = {}
    with jax.set_mesh(mesh):
        for axes in ((), ("model",)):
            model = RandLora(pods.Net(layout), config)
            given = model.adapt({"params": params}, x)
            given = jax.device_put(given, rl.sharding(given, config, bases_axes=axes))
            model = model.with_layout(given, x) if told else model
            trainable, frozen = rl.split(given, config)
            compiled = shipped_jit(step(model)).lower(trainable, frozen, x).compile()
            moved[axes] = pods.exchanged(compiled)
    rows = pods.D * given["randlora_bases"]["randlora_B"][0].nbytes
    more = {kind: n - moved[()][kind] for kind, n in moved["model",].items()}
    assert (
        0 < more["all-gather"] <= 3 * rows
    )  # forward, again in the rematerialised block, backward
    assert more["collective-permute"] <= 3 * rows
    assert more["all-reduce"] == more["all-to-all"] == more["reduce-scatter"] == 0


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_any_layer_computes_the_same_with_them(kind):
    """Heads, and sizes of which the bases have more rows, in NNX."""

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.up = nnx.Linear(8, 32, rngs=rngs)
            self.heads = nnx.LinearGeneral(32, (4, 4), rngs=rngs)
            self.down = nnx.LinearGeneral((4, 4), 8, axis=(-2, -1), rngs=rngs)

        def __call__(self, x):
            return self.down(self.heads(jnp.tanh(self.up(x))))

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    config = rl.RandLoraConfig(r=3, target_modules="all-linear", init_weights=False)
    model, x = inject(Model(), config), jax.random.normal(jax.random.key(1), (8, 8))
    expected = model(x)
    given = variables(model)
    update(model, jax.device_put(given, rl.sharding(given, config, mesh, bases_axes=["model"])))
    assert model.randlora_B.get_value().sharding.spec[0] == "model"
    x = put(x, "data", on=mesh)
    close = {"rtol": 1e-5, "atol": 1e-6 * float(abs(expected).max())}
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), expected, **close)
        if kind == AxisType.Auto:
            set_layout(model, x)
            np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, x), expected, **close)


@pytest.mark.parametrize("features, rows", [(16, "model"), (15, None)])
def test_rows_that_the_axes_do_not_divide_are_whole(features, rows):
    model = RandLora(nn.Dense(features), CONFIG)
    given = model.init(jax.random.key(0), jnp.ones((1, 5)))
    on = jax.make_mesh((8,), ("model",))
    found = rl.sharding(given, CONFIG, on, bases_axes=["model"])["randlora_bases"]
    assert found["randlora_B"].spec[0] == rows
    assert found["randlora_A"].is_fully_replicated
