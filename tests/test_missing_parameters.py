"""A loaded adapter acts whole: on parameters and classes too that the program does not name."""

import warnings

import flax.linen as nn
import jax
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax import registry
from randlora_jax.linen import RandLora
from tests.linen_cases import assert_close, normal, randomised
from tests.nnx_models import trained

D = 5
X = normal(0, 4, D)
CONFIG = rl.RandLoraConfig(r=2, randlora_alpha=2.0, target_modules="all-linear")
INIT = nn.initializers.normal(1.0)
PARAMETERS = {"raw": (0,), "turned": (1,)}


class Own(nn.Module):
    """A class that the training program registers."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", INIT, (D, 7)) @ self.param("other", INIT, (7, D))


class Turned(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", INIT, (D, D)).T


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Turned(name="by_class")(Own(name="own")(nn.Dense(D, name="up")(x)))
        x = x @ self.param("raw", INIT, (D, D)) @ self.param("turned", INIT, (D, D)).T
        return nn.remat(Own)(name="remat")(x)


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(D, D, rngs=rngs)
        self.raw, self.turned = (nnx.Param(rngs.normal((D, D))) for _ in range(2))

    def __call__(self, x):
        return self.up(x) @ self.raw[...] @ self.turned[...].T


@pytest.fixture
def registered():
    """Runs with the classes registered; what comes after it has none."""
    rl.register_layer(Own)
    rl.register_layer(Turned, kernel="w", input_axes=(1,))
    yield lambda: [registry._RULES.pop(cls, None) for cls in (Own, Turned)]
    for cls in (Own, Turned):
        registry._RULES.pop(cls, None)


@pytest.mark.parametrize("jitted", [False, True])
def test_in_linen(registered, tmp_path, jitted):
    training = RandLora(Model(), CONFIG, parameters=PARAMETERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of "other"
        variables = training.adapt(Model().init(jax.random.key(0), X), X)
    variables = {**variables, "randlora": randomised(variables["randlora"])}
    assert len(variables["randlora"]) == 6
    expected = training.apply(variables, X)
    rl.save_adapter(tmp_path / "a", variables, CONFIG)
    registered()
    loaded, config = rl.load_adapter(tmp_path / "a", {"params": variables["params"]})
    serving = RandLora(Model(), config)
    apply = jax.jit(serving.apply) if jitted else serving.apply
    assert_close(apply(loaded, X), expected, 1e-5)
    assert_close(Model().apply({"params": serving.merge(loaded)}, X), expected, 1e-5)


def test_in_nnx(tmp_path):
    model = trained(NnxModel(), CONFIG, parameters=PARAMETERS)
    rl.save_adapter(tmp_path / "a", rx.variables(model), CONFIG)
    serving = NnxModel()
    rx.load_adapter(tmp_path / "a", serving)
    assert_close(serving(X), model(X), 1e-6)
    assert_close(rx.merge(serving)(X), model(X), 1e-5)
