"""Experts that a mesh divides: devices exchange their own experts' scales, and nothing else."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import RandLoraParam, inject, set_layout
from tests.compiling import shipped_jit
from tests.pods import exchanged

EXPERTS, TOKENS, D, F = 8, 64, 32, 48
CONFIG = rl.RandLoraConfig(r=4, randlora_alpha=8, target_modules="all-linear")
EQUATIONS = "ecd,edf->ecf", "ecf,efd->ecd"
X = jax.random.normal(jax.random.key(0), (EXPERTS, TOKENS, D))


class General(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = lambda n, name: nn.DenseGeneral(n, batch_dims=(0,), use_bias=False, name=name)
        return dense(D, "out")(nn.gelu(dense(F, "gate")(x)))


class Lifted(nn.Module):
    """The same by `nn.vmap`, around each layer."""

    @nn.compact
    def __call__(self, x):
        lifted = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=EXPERTS
        )
        dense = lambda n, name: lifted(n, use_bias=False, name=name)
        return dense(D, "out")(nn.gelu(dense(F, "gate")(x)))


class Raw(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.normal(0.2)
        x = jnp.einsum(EQUATIONS[0], x, self.param("gate", init, (EXPERTS, D, F)))
        return jnp.einsum(EQUATIONS[1], nn.gelu(x), self.param("out", init, (EXPERTS, F, D)))


class Einsums(nnx.Module):
    def __init__(self, spec=None):
        rngs = nnx.Rngs(0)
        sharded = lambda init: nnx.with_partitioning(init, spec) if spec else init
        einsum = lambda equation, shape: nnx.Einsum(
            equation, shape, rngs=rngs, kernel_init=sharded(nnx.initializers.lecun_normal())
        )
        self.gate = einsum(EQUATIONS[0], (EXPERTS, D, F))
        self.out = einsum(EQUATIONS[1], (EXPERTS, F, D))

    def __call__(self, x):
        return self.out(nnx.gelu(self.gate(x)))


def devices(kind):
    return jax.make_mesh((4, 2), ("expert", "data"), axis_types=(kind,) * 2)


def check(compiled, given, expected, scales, more=0):
    """Nothing is gathered, sums are those of a device's scales, and gradients are right."""
    moved = exchanged(compiled)
    assert moved["all-gather"] + moved["all-to-all"] + moved["collective-permute"] == 0, moved
    assert moved["all-reduce"] <= 1.05 * scales / 4 + more + 64, (moved, scales / 4)
    for got, wanted in zip(
        jax.tree.leaves(compiled(*given)), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(np.asarray(got) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def moved(tree):
    return jax.tree.map(lambda a: a + jnp.asarray(0.1, a.dtype), tree)


@pytest.mark.parametrize("told", ["told", "compiler", "types"])
@pytest.mark.parametrize(
    ("base", "strategy"),
    [
        (General(), "auto"),
        (General(), "factored"),
        (Lifted(), "auto"),
        (Lifted(), "factored"),
        (Raw(), "auto"),
    ],
    ids=["general", "general, factored", "vmap", "vmap, factored", "raw"],
)
def test_linen(base, strategy, told):
    kind = AxisType.Explicit if told == "types" else AxisType.Auto
    raw = dict(zip(("gate", "out"), EQUATIONS, strict=True)) if isinstance(base, Raw) else {}
    config = CONFIG.replace(target_modules=[*raw]) if raw else CONFIG
    mesh = devices(kind)
    put = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, P(*axes)))
    params, x = base.init(jax.random.key(1), X)["params"], put(X, "expert", "data")
    model = RandLora(base, config, strategy=strategy, parameters=raw)
    variables = model.adapt({"params": put(params, "expert")}, x)
    placed = model.with_layout(variables, x) if told == "told" else model
    trainable, frozen = rl.split(variables, config)
    trainable = moved(trainable)
    for leaf in jax.tree.leaves(trainable):
        assert leaf.sharding.spec[0] == "expert"
    of_scales = rl.sharding(variables, config)["randlora"]
    same = lambda sharding, a: sharding.is_equivalent_to(a.sharding, a.ndim)
    assert jax.tree.all(jax.tree.map(same, of_scales, trainable["randlora"]))
    step = lambda model: jax.value_and_grad(
        lambda t, f, x: jnp.sum(model.apply(rl.combine(t, f), x) ** 2)
    )
    with jax.set_mesh(mesh):
        compiled = shipped_jit(step(placed)).lower(trainable, frozen, x).compile()
    here = jax.device_get((trainable, frozen, x))
    scales = sum(a.nbytes for a in jax.tree.leaves(trainable))
    # Of raw kernels the gradient is one of the changed kernel, summed before it is contracted.
    kernels = 2 * 4 * EXPERTS * D * F / 4 if raw else 0
    check(compiled, (trainable, frozen, x), jax.jit(step(model))(*here), scales, kernels)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("told", ["told", "compiler", "types"])
def test_nnx(told, named):
    kind = AxisType.Explicit if told == "types" else AxisType.Auto
    mesh = devices(kind)
    put = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, P(*axes)))
    alone = inject(Einsums(), CONFIG)
    with jax.set_mesh(mesh) if named else contextlib.nullcontext():
        model = Einsums(("expert", None, None) if named else None)
    if not named:
        nnx.update(model, put(nnx.state(model, nnx.Param), "expert"))
    inject(model, CONFIG)
    x = put(X, "expert", "data")
    if told == "told":
        set_layout(model, x)

    def parts(model):
        graphdef, scales, rest = nnx.split(model, RandLoraParam, ...)
        step = jax.value_and_grad(
            lambda scales, rest, x: jnp.sum(nnx.merge(graphdef, scales, rest)(x) ** 2)
        )
        return step, moved(scales), rest

    step, scales, rest = parts(model)
    with jax.set_mesh(mesh):
        compiled = shipped_jit(step).lower(scales, rest, x).compile()
    expected_step, *here = parts(alone)
    size = sum(a.nbytes for a in jax.tree.leaves(scales))
    check(compiled, (scales, rest, x), jax.jit(expected_step)(*here, X), size)
