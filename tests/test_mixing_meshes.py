"""Rows with adapters of their own on 8 devices: the same numbers, and what they exchange."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax import trees
from randlora_jax.linen import RandLora
from tests.compiling import shipped_jit
from tests.linen_cases import normal
from tests.mixing import small
from tests.pods import exchanged
from tests.test_communication import CONFIG, Stack

CONFIGS = {"chat": CONFIG, "code": CONFIG.replace(randlora_alpha=-3.0)}
CAPACITY, ROWS = 8, 8
NAMES = ["chat", "__base__", "code", "chat"] * 2
X = normal(1, ROWS, 16, 64)


@functools.cache
def made():
    """(variables of a table, the table) on one device."""
    params = Stack().init(jax.random.key(0), X)["params"]
    model = RandLora(Stack(), CONFIGS)
    variables = model.adapt({"params": params}, X)
    scales = {n: small(variables["randlora"][n], i) for i, n in enumerate(CONFIGS)}
    return rl.adapters.table({**variables, "randlora": scales}, CONFIGS, capacity=CAPACITY)


def step(model):
    def loss(scales, rest, x, ids):
        y = model.apply({**rest, "randlora": scales}, x, adapter_ids=ids)
        return jnp.mean(y**2), y

    return jax.value_and_grad(loss, has_aux=True)


@functools.cache
def expected():
    variables, table = made()
    run = jax.jit(step(RandLora(Stack(), table.config)))
    return run(variables["randlora"], variables, X, table.ids(NAMES))


def on_mesh(kind, kernels, **options):
    """(variables, batch, ids), divided among 8 devices."""
    variables, table = made()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    spec = lambda path: kernels["up" in path[0]] if path[-1] == "kernel" else P()
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
    params = trees.map_with_path(lambda path, a: put(a, spec(path)), variables["params"])
    variables = {**variables, "params": params}
    places = rl.sharding(variables, table.config, mesh, **options)
    variables = jax.device_put(variables, places)
    return variables, put(X, P("data")), put(table.ids(NAMES), P("data")), table


DIVIDED = {True: P("data", "model"), False: P("model", "data")}
TENSOR = {True: P(None, "model"), False: P("model", None)}
PLACES = {
    "whole": {},
    "gammas divided": {"data_axes": ["data"]},
    "table divided": {"table_axes": ["data"]},
    "table and bases divided": {"table_axes": ["model"], "bases_axes": ["model"]},
}


def check(found):
    (loss, y), gradients = found
    (their_loss, theirs), wanted = expected()
    np.testing.assert_allclose(loss, their_loss, rtol=1e-5)
    np.testing.assert_allclose(y, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))
    for (path, one), (_, other) in zip(trees.items(gradients), trees.items(wanted), strict=True):
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=str(path))


HOW = [(how, p) for how in ("by the compiler", "by types") for p in ("whole", "table divided")]
HOW += [("by the user", p) for p in PLACES]


@pytest.mark.parametrize("how, places", HOW)
def test_a_step_is_the_same_however_batch_and_table_are_divided(how, places):
    kind = AxisType.Explicit if how == "by types" else AxisType.Auto
    kernels = TENSOR if how == "by types" else DIVIDED
    variables, x, ids, table = on_mesh(kind, kernels, **PLACES[places])
    model = RandLora(Stack(), table.config)
    model = model.with_layout(variables, x) if how == "by the user" else model
    with jax.set_mesh(x.sharding.mesh):
        found = shipped_jit(step(model))(variables["randlora"], variables, x, ids)
    check(found)


@pytest.mark.parametrize("told", [False, True])
def test_devices_exchange_the_gradients_of_the_table_and_nothing_else(told):
    variables, x, ids, table = on_mesh(AxisType.Auto, {True: P(), False: P()})
    model = RandLora(Stack(), table.config)
    model = model.with_layout(variables, x) if told else model
    run = lambda *args: step(model)(*args)[1]
    args = variables["randlora"], variables, x, ids
    found = exchanged(shipped_jit(run).lower(*args).compile())
    scales = sum(4 * math.prod(a.shape) for a in jax.tree.leaves(variables["randlora"]))
    assert found.pop("all-reduce") <= scales + 64
    assert sum(found.values()) == 0
    forward = shipped_jit(lambda v, x, ids: model.apply(v, x, adapter_ids=ids))
    found = exchanged(forward.lower(variables, x, ids).compile())
    assert sum(found.values()) == 0


class NnxStack(nnx.Module):
    """One block of `Stack`."""

    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(128, 64, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(x)))


def test_the_same_in_nnx():
    model = rx.inject(NnxStack(nnx.Rngs(0)), CONFIGS)
    values = rx.variables(model)
    scales = {n: small(values["randlora"][n], i) for i, n in enumerate(CONFIGS)}
    values, table = rl.adapters.table({**values, "randlora": scales}, CONFIGS, capacity=CAPACITY)
    model = rx.inject(NnxStack(nnx.Rngs(0)), table.config, values=values)
    alone = nnx.jit(lambda model, x, ids: model(x, adapter_ids=ids))(model, X, table.ids(NAMES))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    nnx.update(model, jax.tree.map(put, nnx.state(model)))
    rx.set_layout(model, put(X, "data"))
    ids = put(table.ids(NAMES), "data")
    y = nnx.jit(lambda model, x, ids: model(x, adapter_ids=ids))(model, put(X, "data"), ids)
    assert y.sharding.spec[0] == "data"
    np.testing.assert_allclose(y, alone, rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))
