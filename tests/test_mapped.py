"""What devices exchange under `jax.vmap`, `nn.vmap` and a `shard_map` over some axes of a mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax.linen import RandLora
from tests.compiling import shipped_jit
from tests.pods import exchanged, loss

CONFIG = rl.RandLoraConfig(r=8, randlora_alpha=8, target_modules="all-linear")
COUNT, TOKENS, D, F = 8, 64, 32, 64
STACKED = {"params": 0, "randlora": 0, "randlora_bases": None}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(F, use_bias=False, name="up")(x))
        return x + nn.Dense(D, use_bias=False, name="down")(hidden)


class Experts(nn.Module):
    """A stack of them, each with tokens of its own."""

    spmd: str | None = None

    @nn.compact
    def __call__(self, x):
        options = {"spmd_axis_name": self.spmd} if self.spmd else {}
        lifted = nn.vmap(
            Mlp, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=COUNT,
            **options,
        )  # fmt: skip
        return lifted(name="experts")(x)


def noisy(tree):
    keys = iter(jax.random.split(jax.random.key(2), 99))
    return jax.tree.map(lambda a: a + 0.05 * jax.random.normal(next(keys), a.shape), tree)


def adapted(model, x, stack=False):
    variables = model.init(jax.random.key(0), x)
    variables["randlora"] = noisy(variables["randlora"])
    if stack:  # an ensemble of models on the same bases
        several = lambda tree: noisy(jax.tree.map(lambda a: jnp.stack([a] * COUNT), tree))
        variables = {**variables, **{k: several(variables[k]) for k in ("params", "randlora")}}
    return variables


def check(apply, variables, x, places, kinds=(AxisType.Auto, AxisType.Explicit)):
    """What is exchanged: the gradients of scales that devices share, and nothing else.

    Args:
      places: the specs of params, scales and x.
    """
    trainable, frozen = rl.split(variables, CONFIG)
    step = jax.value_and_grad(lambda t, f, x: loss(apply(rl.combine(t, f), x)))
    expected = jax.jit(step)(trainable, frozen, x)
    of_params, of_scales, of_x = places
    scales = sum(a.nbytes for a in jax.tree.leaves(trainable)) if of_scales == P() else 0
    for kind in kinds:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        put = lambda tree, spec, mesh=mesh: jax.device_put(tree, NamedSharding(mesh, spec))
        frozen_there = {
            "params": put(frozen["params"], of_params),
            "randlora_bases": put(frozen["randlora_bases"], P()),
        }
        given = put(trainable, of_scales), frozen_there, put(x, of_x)
        with jax.set_mesh(mesh):
            compiled = shipped_jit(step).lower(*given).compile()
        moved = exchanged(compiled)
        assert moved["all-gather"] + moved["all-to-all"] + moved["collective-permute"] == 0
        assert moved["all-reduce"] <= 1.05 * scales + 64  # and the loss
        for got, wanted in zip(
            jax.tree.leaves(compiled(*given)), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("spmd", [{}, {"spmd_axis_name": "data"}], ids=["vmap", "spmd"])
def test_an_ensemble_that_is_divided_by_its_members_exchanges_nothing(spmd):
    x = jax.random.normal(jax.random.key(1), (COUNT, TOKENS, D))
    model = RandLora(Mlp(), CONFIG)
    apply = lambda v, x: jax.vmap(model.apply, (STACKED, 0), **spmd)(v, x)
    check(apply, adapted(model, x[0], stack=True), x, (P("data"), P("data"), P("data")))


@pytest.mark.parametrize("spmd", [{}, {"spmd_axis_name": "data"}], ids=["vmap", "spmd"])
def test_a_map_over_examples_sums_the_scales_gradients(spmd):
    x = jax.random.normal(jax.random.key(1), (COUNT, TOKENS, D))
    model = RandLora(Mlp(), CONFIG)
    apply = lambda v, x: jax.vmap(model.apply, (None, 0), **spmd)(v, x)
    check(apply, adapted(model, x[0]), x, (P(), P(), P("data")))


def test_an_old_jax_is_refused_where_it_can_not_divide_what_is_mapped(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 8, 3))
    x = jax.random.normal(jax.random.key(1), (COUNT, TOKENS + 3, D))  # of no other test: not cached
    model = RandLora(Mlp(), CONFIG)
    variables = adapted(model, x[0], stack=True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    places = {"params": P("data"), "randlora": P("data"), "randlora_bases": P()}
    there = {name: put(tree, places[name]) for name, tree in variables.items()}
    apply = jax.vmap(model.apply, (STACKED, 0))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"install jax>=0\.9, or make"):
        apply(there, put(x, P("data")))
    assert apply(variables, x).shape == x.shape


def test_an_ensemble_whose_tokens_are_divided_sums_the_scales_gradients():
    x = jax.random.normal(jax.random.key(1), (COUNT, TOKENS, D))
    model = RandLora(Mlp(), CONFIG)
    apply = lambda v, x: jax.vmap(model.apply, (STACKED, 0))(v, x)
    check(apply, adapted(model, x[0], stack=True), x, (P(), P(), P(None, "data")))


def test_maps_within_maps():
    x = jax.random.normal(jax.random.key(1), (2, COUNT, TOKENS, D))
    model = RandLora(Mlp(), CONFIG)
    one = lambda v, x: jax.vmap(model.apply, (STACKED, 0))(v, x)
    apply = lambda v, x: jax.vmap(one, (None, 0))(v, x)
    places = P("data"), P("data"), P(None, "data")
    check(apply, adapted(model, x[0, 0], stack=True), x, places)


@pytest.mark.parametrize("spmd", [None, "data"], ids=["vmap", "spmd"])
def test_experts_in_a_lifted_map_exchange_nothing(spmd):
    x = jax.random.normal(jax.random.key(1), (COUNT, TOKENS, D))
    model = RandLora(Experts(spmd), CONFIG)
    check(
        model.apply, adapted(RandLora(Experts(), CONFIG), x), x,
        (P("data"), P("data"), P("data")),
    )  # fmt: skip


def test_one_function_is_taken_for_another_by_nobody():
    """The rule of the map is found by the function's own, however often it is mapped."""
    x = jax.random.normal(jax.random.key(1), (2, 3, 4, D))
    for strategy in ("merged", "factored"):
        model = RandLora(nn.Dense(F), CONFIG, strategy=strategy)
        variables = adapted(model, x[0, 0])
        run = lambda x, model=model, v=variables: model.apply(v, x)
        expected = run(x)
        for mapped in (jax.vmap(run), jax.vmap(jax.vmap(run)), jax.vmap(run, 1, 1)):
            np.testing.assert_allclose(jax.jit(mapped)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("check_vma", [False, True])
def test_a_shard_map_over_some_axes_leaves_the_others_to_what_is_told(check_vma):
    mesh = jax.make_mesh((2, 4), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(1), (2, TOKENS, D))
    model = RandLora(Mlp(), CONFIG)
    variables = adapted(model, x[0])
    whole = jax.device_put(variables, NamedSharding(mesh, P()))
    batch = jax.device_put(x, NamedSharding(mesh, P("stage", "data")))
    told = model.with_layout(whole, batch)

    def step(model, variables, x):
        value = lambda scales: loss(model.apply({**variables, "randlora": scales}, x))
        return jax.value_and_grad(value)(variables["randlora"])

    def by_hand(variables, x):
        def local(variables, x):
            value, grads = step(told, variables, x)
            # Where types tell that the scales are the same for all, JAX has summed by itself.
            mean = lambda a: a / 2 if check_vma else jax.lax.pmean(a, "stage")
            return jax.lax.pmean(value, "stage"), jax.tree.map(mean, grads)

        return jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P("stage")), out_specs=P(), axis_names={"stage"},
            check_vma=check_vma,
        )(variables, x)  # fmt: skip

    with jax.set_mesh(mesh):
        compiled = shipped_jit(by_hand).lower(whole, batch).compile()
        got = compiled(whole, batch)
    scales = sum(a.nbytes for a in jax.tree.leaves(variables["randlora"]))
    moved = exchanged(compiled)
    # Once over "data", once by hand over "stage", and the loss with each.
    assert moved["all-reduce"] <= 2.05 * scales + 64
    assert sum(moved.values()) == moved["all-reduce"]
    expected = step(model, variables, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
