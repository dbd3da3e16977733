"""Modules whose names have characters that mean something elsewhere, in both front ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import load_adapter, merge, variables
from tests import nnx_models
from tests.linen_cases import assert_same_bits, normal, randomised

X = normal(0, 2, 5)
CONFIG = rl.RandLoraConfig(r=3, randlora_alpha=2.0, target_modules="all-linear", bias="all")
NAMES = ["h[0]", "w[0,1]", "a.b", "a/b", "x y", "é", "a:b", "0", "kernel", "randlora", "h[0]/w[1]"]


class Linen(nn.Module):
    name_of_layer: str

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(7, name=self.name_of_layer)(x))
        return nn.DenseGeneral((2, 3), name="w[1]")(x)


class Nnx(nnx.Module):
    def __init__(self, name):
        rngs = nnx.Rngs(0)
        self.layers = nnx.Dict({name: nnx.Linear(5, 7, rngs=rngs)})
        self.head = nnx.Einsum("bi,oi->bo", (4, 7), rngs=rngs)

    def __call__(self, x):
        for layer in self.layers.values():
            x = jnp.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize("name", NAMES)
def test_linen(name, tmp_path):
    base = Linen(name)
    given = base.init(jax.random.key(0), X)
    model = RandLora(base, CONFIG)
    adapted = model.adapt(given, X)
    trained = {**adapted, "randlora": randomised(adapted["randlora"])}
    y = model.apply(trained, X)
    expected = base.apply({"params": model.merge(trained)}, X)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    rl.save_adapter(tmp_path / "adapter", trained, CONFIG)
    loaded, config = rl.load_adapter(tmp_path / "adapter", given)
    assert config == CONFIG
    assert_same_bits(loaded, trained)
    trainable, _ = rl.split(trained, CONFIG.replace(bias="randlora_only"))
    assert set(trainable["params"]) == {name, "w[1]"}
    assert name in rl.summary(trained, CONFIG)


@pytest.mark.parametrize("name", NAMES)
def test_nnx(name, tmp_path):
    model, other = Nnx(name), Nnx(name)
    nnx_models.trained(model, CONFIG)
    assert set(variables(model)["randlora"]["layers"]) == {name}
    y = model(X)
    rl.save_adapter(tmp_path / "adapter", variables(model), CONFIG)
    load_adapter(tmp_path / "adapter", other)
    np.testing.assert_array_equal(other(X), y)
    np.testing.assert_allclose(merge(model)(X), y, rtol=1e-5, atol=1e-5)
