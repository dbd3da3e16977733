"""A base's submodules whatever they are called, adapted submodules, and transforms in the way."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from randlora_jax import RandLoraConfig
from randlora_jax.linen import RandLora
from randlora_jax.nnx import RandLoraParam
from tests.linen_cases import R, as_numpy, assert_close, assert_same_bits, normal, randomised
from tests.linen_models import Block, Holds

X = normal(0, 4, 5)
CONFIG = RandLoraConfig(r=R, randlora_alpha=2.0, target_modules="all-linear")
KEY = jax.random.key(0)


def train(variables):
    return {**variables, "randlora": randomised(variables["randlora"])}


class TakesNames(nn.Module):
    """Submodules with the names of the wrapper's own attributes."""

    def setup(self):
        self.base, self.config = nn.Dense(7), nn.Dense(5)

    def __call__(self, x):
        return self.config(nn.tanh(self.base(x)))


@pytest.mark.parametrize(
    "base", [TakesNames(), Holds(Holds(nn.Dense(7)))], ids=["wrapper's names", "attributes"]
)
def test_initial_values_are_the_bases_whatever_its_submodules_are_called(base):
    variables = RandLora(base, CONFIG).init(KEY, X)
    assert_same_bits(variables["params"], base.init(KEY, X)["params"])


class Parent(nn.Module):
    """A submodule, adapted or not, beside a layer that is not adapted."""

    make: Any
    adapted: bool

    @nn.compact
    def __call__(self, x):
        inner = self.make(name="inner")
        inner = RandLora(inner, CONFIG) if self.adapted else inner
        return inner(nn.tanh(nn.Dense(5, name="outer")(x)))


class ParentInSetup(nn.Module):
    make: Any
    adapted: bool

    def setup(self):
        inner = self.make()
        self.inner = RandLora(inner, CONFIG) if self.adapted else inner
        self.outer = nn.Dense(5)

    def __call__(self, x):
        return self.inner(nn.tanh(self.outer(x)))


def holds_layer():
    return Holds(nn.Dense(7))


PARENTS = {
    "compact": (Parent, Block),
    "compact, wrapper's names": (Parent, TakesNames),
    "setup": (ParentInSetup, Block),
    "setup, wrapper's names": (ParentInSetup, TakesNames),
    "setup, attributes": (ParentInSetup, holds_layer),
}


@pytest.fixture(params=PARENTS)
def parents(request):
    """A module with an adapted submodule, and the same with a plain one."""
    parent, make = PARENTS[request.param]
    return parent(make, True), parent(make, False)


def test_an_adapted_submodule_leaves_its_parent_as_it_was(parents):
    variables, base_variables = (parent.init(KEY, X) for parent in parents)
    assert_same_bits(variables["params"], base_variables["params"])
    assert set(variables["randlora"]) == set(variables["randlora_bases"]) == {"inner"}
    actual, expected = parents[0].apply(variables, X), parents[1].apply(base_variables, X)
    assert_same_bits(actual, expected)


def test_an_adapted_submodule_computes_with_its_update(parents):
    trained = train(parents[0].init(KEY, X))
    inner = {name: collection["inner"] for name, collection in trained.items()}
    merged = RandLora(parents[0].make(), CONFIG).merge(inner)
    expected = parents[1].apply({"params": {**trained["params"], "inner": merged}}, X)
    assert_close(as_numpy(parents[0].apply(trained, X)), as_numpy(expected), 2e-5)


class AdaptedStep(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return RandLora(Block(name="block"), CONFIG)(x), None


def test_a_scan_over_adapted_submodules_stacks_scales_and_shares_bases():
    lifted = nn.scan(
        AdaptedStep,
        variable_axes={"params": 0, "randlora": 0},
        variable_broadcast="randlora_bases",
        split_rngs={"params": True},
        length=3,
    )
    variables = lifted().init(KEY, X, None)
    assert variables["randlora"]["block"]["up"]["randlora_lambda"].shape == (3, R, 2)
    assert variables["randlora_bases"]["block"]["randlora_B"].shape == (7, 2, R)


def test_a_model_in_the_nnx_bridge_computes_what_it_computes_in_linen():
    model = nnx.bridge.ToNNX(RandLora(Block(), CONFIG), rngs=nnx.Rngs(0))
    nnx.bridge.lazy_init(model, X)
    plain = nnx.bridge.lazy_init(nnx.bridge.ToNNX(Block(), rngs=nnx.Rngs(0)), X)
    assert_same_bits(model(X), plain(X))
    kinds = {v.type.__name__ for _, v in nnx.to_flat_state(nnx.state(model))}
    assert {"Param", "RandLoraParam", "RandLoraBasis"} <= kinds


class InitialisesItself(nn.Module):
    """As openpi's model: what is called `init` is a method of its own, and makes the inputs."""

    @nn.compact
    def __call__(self, x):
        return Block(name="block")(x)

    def init(self):
        return self(jnp.ones((1, 5)))


def test_a_model_may_have_a_method_that_is_called_init():
    make = lambda module: nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(method="init")
    model, plain = make(RandLora(InitialisesItself(), CONFIG)), make(InitialisesItself())
    assert_same_bits(model(X), plain(X))
    assert nnx.to_flat_state(nnx.state(model, RandLoraParam))


# Transforms that would come between a layer and its scales

JITTED = nn.jit(Block)


class HoldsJitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JITTED(name="block")(x)


class JittedCall(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return nn.Dense(7)(x)


class HoldsJittedCall(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JittedCall(name="jitted")(x)


@pytest.mark.parametrize("base", [HoldsJitted(), JittedCall(), HoldsJittedCall()], ids=type)
def test_nn_jit_never_repeats_what_another_adapter_computed(base):
    params = base.init(KEY, X)["params"]
    louder = dataclasses.replace(CONFIG, randlora_alpha=20.0)
    outputs = []
    for model in (RandLora(base, CONFIG), RandLora(base, louder)):
        trained = train(model.adapt({"params": params}, X))
        outputs.append(model.apply(trained, X))
        expected = base.apply({"params": model.merge(trained)}, X)
        assert_close(as_numpy(outputs[-1]), as_numpy(expected), 2e-5)
    assert not np.allclose(*outputs)


class Normalises(nn.Module):
    """A layer whose parameters another one maps, as it would map the scales beside them."""

    by: Any

    @nn.compact
    def __call__(self, x):
        options = {"update_stats": False} if self.by is nn.SpectralNorm else {}
        return nn.Dense(5, name="plain")(self.by(nn.Dense(7, name="mapped"))(x, **options))


@pytest.mark.parametrize("by", [nn.WeightNorm, nn.SpectralNorm])
def test_a_layer_whose_parameters_are_normalised_raises_and_says_how_to_leave_it_out(by):
    params = Normalises(by).init(KEY, X)
    with pytest.raises(ValueError, match=rf"'mapped' is within a {by.__name__}.*exclude_modules"):
        RandLora(Normalises(by), CONFIG).adapt(params, X)


@pytest.mark.parametrize("by", [nn.WeightNorm, nn.SpectralNorm])
def test_a_normalised_layer_that_is_left_out_stays_as_it_was(by):
    config = dataclasses.replace(CONFIG, exclude_modules=("mapped",))
    base_variables = Normalises(by).init(KEY, X)
    model = RandLora(Normalises(by), config)
    variables = model.adapt(base_variables, X)
    assert set(variables["randlora"]) == {"plain"}
    assert_same_bits(model.apply(variables, X), Normalises(by).apply(base_variables, X))
