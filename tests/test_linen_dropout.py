"""The adapter's dropout: when it is on, what it draws, and what it acts on."""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from randlora_jax import RandLoraConfig
from randlora_jax.linen import RandLora
from tests.linen_cases import as_numpy, assert_close, assert_same_bits, normal, randomised
from tests.linen_models import Block, Dropped, GemmaEinsum

X = normal(0, 4, 5)
RATE = 0.3
RNGS = {"dropout": jax.random.key(2)}
CONFIG = RandLoraConfig(r=3, randlora_alpha=2.0, target_modules="all-linear", randlora_dropout=RATE)


@functools.cache
def trained(base=None):
    """A model with dropout on its adapter, and variables whose update is not zero."""
    model = RandLora(base or nn.Dense(7), CONFIG)
    variables = model.init(jax.random.key(0), X)
    return model, {**variables, "randlora": randomised(variables["randlora"])}


def test_deterministic_in_the_call_switches_it_off():
    model, variables = trained()
    y = model.apply(variables, X, deterministic=True)
    merged = model.base.apply({"params": model.merge(variables)}, X)
    assert_close(as_numpy(y), as_numpy(merged), 1e-5)


def test_deterministic_of_the_wrapper_is_that_of_a_call_without_one():
    model, variables = trained()
    off, on = (model.clone(deterministic=d) for d in (True, False))
    y = off.apply(variables, X)
    assert_same_bits(y, model.apply(variables, X, deterministic=True))
    assert_same_bits(on.apply(variables, X, deterministic=True), y)
    noisy = on.apply(variables, X, rngs=RNGS)
    assert_same_bits(noisy, model.apply(variables, X, deterministic=False, rngs=RNGS))
    assert not np.allclose(noisy, y)


def test_a_base_that_takes_deterministic_itself_is_given_it():
    model = RandLora(Dropped(), CONFIG)
    variables = model.init({"params": jax.random.key(0), **RNGS}, X)
    for args, kwargs in (((X, True), {}), ((X,), {"deterministic": True})):
        y = model.apply(variables, *args, **kwargs)
        assert_same_bits(y, Dropped().apply({"params": variables["params"]}, X, True))


def test_no_word_on_deterministic_raises():
    model, variables = trained()
    with pytest.raises(ValueError, match=r"randlora_dropout=0\.3 needs deterministic"):
        model.apply(variables, X)


def test_a_missing_rng_raises_the_error_of_flax():
    model, variables = trained()
    with pytest.raises(InvalidRngError, match='needs PRNG for "dropout"'):
        model.apply(variables, X, deterministic=False)


def test_one_key_draws_one_mask_and_another_key_another():
    model, variables = trained()
    call = lambda seed: model.apply(
        variables, X, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )
    assert_same_bits(call(3), call(3))
    assert not np.allclose(call(3), call(4))


def test_it_acts_on_the_adapters_input_alone():
    model, variables = trained()
    x = jnp.eye(5) + 1  # no zeros
    y = model.apply(variables, x, deterministic=False, rngs=RNGS)
    W = as_numpy(variables["params"]["kernel"])
    update = as_numpy(model.merge(variables)["kernel"]) - W
    noise = as_numpy(y) - as_numpy(x) @ W - as_numpy(variables["params"]["bias"])
    dropped = np.linalg.lstsq(update.T, noise.T)[0].T  # what the adapter saw: (tokens, in)
    ratio = dropped / as_numpy(x)
    kept = np.abs(ratio - 1 / (1 - RATE)) < 1e-3
    assert (kept | (np.abs(ratio) < 1e-3)).all()
    assert 0 < kept.sum() < kept.size


@pytest.mark.parametrize("kind", ["dot_general", "kernel"])
def test_its_expectation_is_the_output_without_it(kind):
    if kind == "dot_general":
        model, variables = trained()
        args = (X,)
    else:  # a layer that is reached by its kernel
        model = RandLora(GemmaEinsum((5, 7)), CONFIG)
        args = ("bd,dh->bh", X)
        variables = model.init(jax.random.key(0), *args)
        variables = {**variables, "randlora": randomised(variables["randlora"])}
    draw = lambda key: model.apply(variables, *args, deterministic=False, rngs={"dropout": key})
    draws = as_numpy(jax.vmap(draw)(jax.random.split(jax.random.key(6), 2000)))
    expected = as_numpy(model.apply(variables, *args, deterministic=True))
    error = np.abs(draws.mean(0) - expected)
    assert (error < 5 * draws.std(0) / np.sqrt(len(draws))).all()
    assert draws.std(0).min() > 1e-3


class Layer(nn.Module):
    times: int = 1

    @nn.compact
    def __call__(self, carry, x):
        layer = nn.Dense(7, name="layer")
        return carry, jnp.stack([layer(x) for _ in range(self.times)])


class Beside(nn.Module):
    """Layers of one stack on the same input, beside one another, each called twice.

    Whoever writes a stack of layers without dropout has no reason to list it in `split_rngs`.
    """

    listed: bool = True
    axis: int = 0
    lift: Any = nn.scan
    inner: Any = staticmethod(lambda layer: layer)

    @nn.compact
    def __call__(self, x):
        options = {"split_rngs": {"params": True, **({"dropout": True} if self.listed else {})}}
        options |= {"variable_axes": {"params": self.axis}, "in_axes": nn.broadcast}
        if self.lift is nn.vmap:
            options |= {"axis_size": 2, "in_axes": None}
        else:
            options |= {"length": 2}
        return self.lift(self.inner(Layer), **options)(2, name="stack")(None, x)[1]


@pytest.mark.parametrize(
    "base",
    [
        Beside(),
        Beside(listed=False),
        Beside(listed=False, axis=-1),
        Beside(listed=False, lift=nn.vmap),
        Beside(listed=False, inner=nn.remat),
    ],
)
def test_layers_of_a_stack_draw_masks_of_their_own(base):
    model, variables = trained(base)
    alike = lambda a: jnp.stack([jnp.take(a, 0, base.axis)] * 2, base.axis)
    copied, scales = (jax.tree.map(alike, variables[c]["stack"]) for c in ("params", "randlora"))
    variables = {**variables, "params": {"stack": copied}, "randlora": {"stack": scales}}
    same = model.apply(variables, X, deterministic=True)
    assert_same_bits(same[0], same[1])
    draw = lambda key: model.apply(variables, X, deterministic=False, rngs={"dropout": key})
    y = draw(RNGS["dropout"])
    calls = [y[0, 0], y[0, 1], y[1, 0], y[1, 1]]
    assert not any(np.allclose(a, b) for a, b in itertools.combinations(calls, 2))
    assert_same_bits(draw(RNGS["dropout"]), y)
    draws = as_numpy(jax.vmap(draw)(jax.random.split(jax.random.key(6), 2000)))
    error = np.abs(draws.mean(0) - as_numpy(same))
    assert (error < 5 * draws.std(0) / np.sqrt(len(draws))).all()


class Mapped(nn.Module):
    """One layer for all examples, or for all steps: Flax alone can tell it which of them it has."""

    lift: Any

    @nn.compact
    def __call__(self, x):
        return self.lift(nn.Dense)(5, name="layer")(x)


def over_examples(cls):
    return nn.vmap(cls, variable_axes={"params": None}, split_rngs={"params": False})


def over_steps(cls):
    step = nn.scan(
        lambda layer, carry, x: (carry, layer(x)),
        variable_broadcast="params",
        split_rngs={"params": False},
    )
    return lambda *args, **kwargs: lambda x: step(cls(*args, **kwargs), 0.0, x)[1]


@pytest.mark.parametrize("lift", [over_examples, over_steps])
def test_a_key_that_would_serve_several_examples_is_not_made_up(lift):
    model, variables = trained(Mapped(lift))
    assert model.apply(variables, X, deterministic=True).shape == (4, 5)
    with pytest.raises(InvalidRngError, match='needs PRNG for "dropout"'):
        model.apply(variables, X, deterministic=False, rngs=RNGS)


class Jitted(nn.Module):
    """Two layers of one cached trace."""

    @nn.compact
    def __call__(self, carry, x):
        dense = nn.jit(nn.Dense)
        return carry, jnp.stack([dense(7, name="one")(x), dense(7, name="other")(x)])


def test_layers_that_share_a_trace_draw_masks_of_their_own():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            stack = nn.scan(Jitted, in_axes=nn.broadcast, length=2, **options)
            return stack(name="stack")(None, x)[1]

    model, variables = trained(Model())
    first = lambda tree: jax.tree.map(lambda a: jnp.stack([a[0]] * 2), tree["stack"]["one"])
    alike = {c: {"stack": dict.fromkeys(("one", "other"), first(variables[c]))}
             for c in ("params", "randlora")}  # fmt: skip
    y = model.apply({**variables, **alike}, X, deterministic=False, rngs=RNGS)
    calls = [y[0, 0], y[0, 1], y[1, 0], y[1, 1]]
    assert not any(np.allclose(a, b) for a, b in itertools.combinations(calls, 2))


@pytest.mark.parametrize("base", [Block(), Beside(listed=False), Beside()], ids=["", "not", "all"])
def test_a_model_can_differentiate_its_parameters(base):
    class Penalised(nn.Module):
        def setup(self):
            self.inside = base.clone(parent=None)

        def __call__(self, x):
            y = self.inside(x)
            if self.is_initializing():
                return y
            square = lambda p: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))
            return y, jax.grad(square)(self.inside.variables["params"])

    model, variables = trained(Penalised())
    _, gradients = model.apply(variables, X, deterministic=False, rngs=RNGS)
    assert jax.tree.leaves(gradients)


def test_in_a_model_of_a_users_a_stack_that_lists_no_dropout_has_it():
    class Users(nn.Module):
        @nn.compact
        def __call__(self, x):
            return RandLora(Beside(listed=False), CONFIG)(x, deterministic=False)

    variables = Users().init({"params": jax.random.key(0), **RNGS}, X)
    variables = {**variables, "randlora": randomised(variables["randlora"])}
    y = Users().apply(variables, X, rngs=RNGS)
    calls = [y[0, 0], y[0, 1], y[1, 0], y[1, 1]]
    assert not any(np.allclose(a, b) for a, b in itertools.combinations(calls, 2))
    with pytest.raises(InvalidRngError, match='needs PRNG for "dropout"'):
        Users().apply(variables, X)


@pytest.mark.parametrize("several", [False, True])
def test_a_raw_parameter_has_no_input_to_drop_and_says_so(several):
    config = RandLoraConfig(r=3, target_modules=["up"], randlora_dropout=RATE)
    config = {"a": config.replace(randlora_dropout=0.0), "b": config} if several else config

    class Raw(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("weight", nn.initializers.normal(), (5, 7))

    class Holds(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Raw(name="raw")(nn.Dense(5, name="up")(x))

    model = RandLora(Holds(), config, parameters={"raw.weight": (0,)})
    variables = model.init(jax.random.key(0), X)
    message = rf"{RATE} has no input to act on at the raw parameter 'raw.weight'"
    with pytest.raises(ValueError, match=message):
        model.apply(variables, X, deterministic=False, rngs=RNGS)


def test_without_it_no_key_is_drawn_from_the_bases_streams():
    plain = RandLora(Block(), RandLoraConfig(r=3, target_modules="all-linear"))
    variables = plain.init(jax.random.key(0), X)
    jaxpr = str(jax.make_jaxpr(lambda v: plain.apply(v, X, rngs=RNGS))(variables))
    assert "random" not in jaxpr and "threefry" not in jaxpr


def test_explicit_axes_may_divide_the_input():
    """Flax's own layer does not take it there; ours draws a mask that is whole."""
    model, variables = trained()
    x = normal(0, 8, 5)
    call = lambda v, x: model.apply(v, x, deterministic=False, rngs=RNGS)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    where = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        got = jax.jit(call)(variables, jax.device_put(x, where))
    assert_close(as_numpy(got), as_numpy(call(variables, x)), 1e-5)
