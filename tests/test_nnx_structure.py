"""What an injected NNX model holds: its state, ties, containers, what trains, the base again."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import randlora_jax as rl
from randlora_jax.nnx import (
    RandLoraBasis,
    RandLoraParam,
    inject,
    lend_bases,
    merge,
    remove,
    trainable,
    update,
    variables,
)
from tests.nnx_models import CONFIG, MLP, D, assert_close, randomised, trained, x


def test_removing_restores_the_base():
    model, base = trained(MLP(rngs=nnx.Rngs(0))), MLP(rngs=nnx.Rngs(0))
    remove(model)
    assert nnx.graphdef(model) == nnx.graphdef(base)
    np.testing.assert_array_equal(model(x()), base(x()))


def test_state_has_the_base_s_paths_and_one_pair_of_bases():
    model, base = MLP(rngs=nnx.Rngs(0)), MLP(rngs=nnx.Rngs(0))
    inject(model, CONFIG)
    _, added, bases, rest = nnx.split(model, RandLoraParam, RandLoraBasis, ...)
    assert jax.tree.structure(rest) == jax.tree.structure(nnx.state(base))
    assert sorted(bases) == ["randlora_A", "randlora_B"]
    assert added["layers"][1]["up"]["randlora_lambda"].shape == (3, 2)
    assert nnx.state(model, nnx.LoRAParam) == added


def test_scales_and_bases_are_those_of_linen():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="b")(nn.Dense(8, name="a")(x))

    config = CONFIG.replace(init_weights=False, very_sparse=True)
    model = nnx.Dict(a=nnx.Linear(D, 8, rngs=nnx.Rngs(0)), b=nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    inject(model, config)
    params = variables(model)["params"]
    expected = rl.linen.RandLora(Linen(), config).adapt({"params": params}, x())
    jax.tree.map(np.testing.assert_array_equal, variables(model), expected)
    values = {**expected, "randlora": randomised(expected["randlora"])}
    update(model, values)
    with lend_bases(model):
        y = model.b(model.a(x()))
    np.testing.assert_array_equal(y, rl.linen.RandLora(Linen(), config).apply(values, x()))


def test_tied_modules_stay_tied_and_are_adapted_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(D, D, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(self.a(x))

    model = trained(Tied(nnx.Rngs(0)))
    assert model.a is model.b
    assert list(variables(model)["randlora"]) == ["a"]
    y = model(x())
    assert_close(np.asarray(merge(model)(x())), np.asarray(y), 1e-5)


@pytest.mark.parametrize(
    "hold",
    [
        lambda a, b: nnx.List([a, b]),
        lambda a, b: nnx.data([a, b]),
        lambda a, b: nnx.data({"0": a, "1": b}),
        lambda a, b: nnx.Dict({"0": a, "1": b}),
        lambda a, b: nnx.data((a, b)),
    ],
)
def test_containers(hold):
    class Holder(nnx.Module):
        def __init__(self, rngs):
            self.inner = hold(nnx.Linear(D, 4, rngs=rngs), nnx.Linear(D, 5, rngs=rngs))

        def __call__(self, x):
            key = "1" if hasattr(self.inner, "keys") else 1
            return self.inner[key](x)

    model = trained(Holder(nnx.Rngs(0)), CONFIG.replace(target_modules=["inner.1"]))
    assert list(variables(model)["randlora"]["inner"]) == ["1"]
    y = model(x())
    assert_close(np.asarray(merge(model)(x())), np.asarray(y), 1e-5)


def test_a_trained_bias_and_modules_to_save_have_a_filter():
    paths = lambda m: {
        "/".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(m, trainable(m)))
    }
    make = lambda **c: inject(MLP(1, rngs=nnx.Rngs(0)), CONFIG.replace(target_modules=["up"], **c))
    scales = {f"layers/0/up/randlora_{s}" for s in ("lambda", "gamma")}
    assert paths(make()) == scales and trainable(make()) is RandLoraParam
    assert paths(make(bias="randlora_only")) == scales | {"layers/0/up/bias"}
    assert paths(make(bias="all")) == scales | {
        "layers/0/up/bias", "layers/0/down/bias", "head/bias",
    }  # fmt: skip
    assert paths(make(modules_to_save=["head"])) == scales | {"head/kernel", "head/bias"}


def test_summary_reads_an_injected_model():
    model = inject(MLP(rngs=nnx.Rngs(0)), CONFIG)
    text = rl.summary(variables(model), CONFIG)
    assert "layers.1.down  (8, 6)" in text and "one pair for all layers" in text


def test_a_class_can_be_derived_from_that_of_an_injected_model():
    """As MaxText's bridge does with every module that it is given."""
    model = inject(MLP(rngs=nnx.Rngs(0)), CONFIG)
    y = model(x())
    for module in (model, model.head):
        derived = type("Derived", (type(module),), {})
        object.__setattr__(module, "__class__", derived)
    np.testing.assert_array_equal(model(x()), y)
    assert isinstance(model.head, nnx.Linear)
