"""A user's `shard_map`, and meshes that are not the current one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora
from tests.compiling import shipped_jit
from tests.linen_cases import assert_close, normal, randomised
from tests.test_communication import exchanged

CONFIG = rl.RandLoraConfig(r=4, randlora_alpha=4.0, target_modules="all-linear")
X = normal(0, 16, 5, 12)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(12, name="down")(nn.gelu(nn.Dense(20, name="up")(x)))


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.down = nnx.Linear(12, 20, rngs=rngs), nnx.Linear(20, 12, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def linen(strategy):
    """(loss of scales, frozen and x; scales; frozen)."""
    model = RandLora(Model(), CONFIG, strategy=strategy)
    variables = model.adapt(Model().init(jax.random.key(0), X), X)
    trainable, frozen = rl.split(variables, CONFIG)
    loss = lambda scales, rest, x: jnp.mean(model.apply(rl.combine(scales, rest), x) ** 2)
    return loss, randomised(trainable), frozen


def in_place(strategy):
    model = rx.inject(NnxModel(), CONFIG, strategy=strategy)
    graphdef, scales, rest = nnx.split(model, rx.RandLoraParam, ...)
    whole = lambda scales, rest: nnx.merge(graphdef, scales, rest, copy=True)
    loss = lambda scales, rest, x: jnp.mean(whole(scales, rest)(x) ** 2)
    return loss, jax.tree.map(lambda a: a + 0.1, scales), rest


FRONT_ENDS = pytest.mark.parametrize("make", [linen, in_place])


@FRONT_ENDS
@pytest.mark.parametrize("strategy", ["merged", "factored"])
@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_data_divided_by_hand(make, strategy, checked):
    loss, scales, frozen = make(strategy)
    expected = jax.jit(jax.value_and_grad(loss))(scales, frozen, X)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(scales, frozen, x):
        value, gradients = jax.value_and_grad(loss)(scales, frozen, x)
        mean = lambda a: jax.lax.pmean(a, "data")
        # What is the same for all devices has the sum of their gradients, where types tell it.
        gradients = jax.tree.map((lambda a: a / 8) if checked else mean, gradients)
        return mean(value), gradients

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P()), "check_vma": checked}
    run = shipped_jit(jax.shard_map(step, mesh=mesh, **specs))
    assert_close(run(scales, frozen, X), expected, 1e-5)
    moved = exchanged(run.lower(scales, frozen, X).compile())
    assert sum(moved.values()) <= 4 + sum(a.nbytes for a in jax.tree.leaves(scales))


@FRONT_ENDS
def test_an_explicit_mesh_need_not_be_the_current_one(make):
    loss, scales, frozen = make("auto")
    expected = jax.jit(jax.value_and_grad(loss))(scales, frozen, X)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    placed = put(scales, P()), put(frozen, P()), put(X, P("data"))
    assert_close(jax.jit(jax.value_and_grad(loss))(*placed), expected, 1e-5)
    assert_close(loss(*placed), expected[0], 1e-5)  # a gradient that is not jitted, JAX refuses
