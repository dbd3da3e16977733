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
from tests.pods import exchanged

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


class Local(nn.Module):
    """The part of `Model` that one of four devices has, for tensor parallelism by hand."""

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(20 // 4, name="up", use_bias=False)(x))
        return jax.lax.psum(nn.Dense(12, name="down", use_bias=False)(h), "model")


def test_kernels_that_are_divided_by_hand_are_refused():
    wide = CONFIG.replace(r=2)
    whole = {"up": {"kernel": normal(1, 3, 20)}, "down": {"kernel": normal(2, 20, 12)}}
    mesh = jax.make_mesh((4, 2), ("model", "data"), axis_types=(AxisType.Auto,) * 2)

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.gelu(nn.Dense(20, name="up", use_bias=False)(x))
            return nn.Dense(12, name="down", use_bias=False)(h)

    x = normal(3, 8, 3)
    # Of up's (3, 20) a device has (3, 5): the scales fit the one as the other.
    config = wide.replace(target_modules=["up"])
    variables = RandLora(Whole(), config).adapt({"params": whole}, x)
    model = RandLora(Local(), config)
    parts = {"up": {"kernel": P(None, "model")}, "down": {"kernel": P("model")}}
    specs = {"params": parts, "randlora": P(), "randlora_bases": P()}
    run = lambda axes: jax.shard_map(
        lambda v, x: model.apply(v, x),
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=P("data"),
        axis_names=axes,
    )
    with pytest.raises(ValueError, match=r"shape \(3, 5\) differs by device along \['model'\]"):
        jax.jit(run({"model", "data"}))(variables, x)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_in_nnx_they_are_refused_unchecked_too(checked):
    layer = rx.inject(nnx.Linear(3, 20, use_bias=False, rngs=nnx.Rngs(0)), CONFIG.replace(r=2))
    graph, kernel, rest = nnx.split(layer, nnx.All(nnx.Param, nnx.Not(rx.RandLoraParam)), ...)
    run = jax.shard_map(
        lambda kernel, rest, x: nnx.merge(graph, kernel, rest)(x),
        mesh=jax.make_mesh(
            (4,), ("model",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,)
        ),
        in_specs=(P(None, "model"), P(), P()),
        out_specs=P(None, "model"),
        check_vma=checked,
    )
    message = r"Linear.kernel has the shape \(3, 5\), and had \(3, 20\) when it was injected"
    with pytest.raises(ValueError, match=message):
        run(kernel, rest, normal(3, 8, 3))


def test_an_ensemble_by_hand_has_scales_of_its_own():
    mesh = jax.make_mesh((8,), ("member",), axis_types=(AxisType.Auto,))
    model = RandLora(Model(), CONFIG)
    keys = jax.random.split(jax.random.key(0), 8)
    members = jax.vmap(lambda key: model.init(key, X))(keys)
    members = {**members, "randlora": randomised(members["randlora"])}
    own = lambda tree: jax.tree.map(lambda a: a[0], tree)
    run = jax.shard_map(
        lambda v, x: model.apply(own(v), x)[None],
        mesh=mesh,
        in_specs=(P("member"), P()),
        out_specs=P("member"),
    )
    expected = jax.vmap(model.apply, (0, None))(members, X)
    assert_close(jax.jit(run)(members, X), expected, 1e-5)


@FRONT_ENDS
def test_an_explicit_mesh_need_not_be_the_current_one(make):
    loss, scales, frozen = make("auto")
    expected = jax.jit(jax.value_and_grad(loss))(scales, frozen, X)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    placed = put(scales, P()), put(frozen, P()), put(X, P("data"))
    assert_close(jax.jit(jax.value_and_grad(loss))(*placed), expected, 1e-5)
    assert_close(loss(*placed), expected[0], 1e-5)  # a gradient that is not jitted, JAX refuses
