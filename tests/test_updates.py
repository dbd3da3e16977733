"""Whatever method of a module runs, what it computes is what it computes on the merged kernels."""

import jax
import numpy as np
import pytest
from flax import nnx

from randlora_jax import RandLoraConfig
from randlora_jax.linen import RandLora
from randlora_jax.nnx import inject, merge, update, variables
from tests.linen_cases import normal, randomised
from tests.linen_methods import LINEN, Attends, Codec, D, Model
from tests.linen_models import ScanLayer
from tests.nnx_methods import NNX, NnxModel

X = normal(0, 2, D)
CONFIG = RandLoraConfig(r=3, randlora_alpha=2.0, target_modules="all-linear")


@pytest.mark.parametrize("strategy", ["merged", "factored"])
@pytest.mark.parametrize("name", LINEN)
def test_linen_applies_what_it_merges(name, strategy):
    base, parameters = LINEN[name]
    given = base.init(jax.random.key(0), X)
    model = RandLora(base, CONFIG, parameters=parameters, strategy=strategy)
    adapted = model.adapt(given, X)
    assert adapted["randlora"]
    off = 1e-6 if isinstance(base, ScanLayer) else 0
    np.testing.assert_allclose(model.apply(adapted, X), base.apply(given, X), rtol=0, atol=off)
    trained = {**adapted, "randlora": randomised(adapted["randlora"])}
    expected = base.apply({"params": model.merge(trained, X)}, X)
    assert np.abs(expected - base.apply(given, X)).max() > 1e-3
    np.testing.assert_allclose(model.apply(trained, X), expected, rtol=2e-5, atol=2e-5)
    jitted = jax.jit(model.apply)(trained, X)
    np.testing.assert_allclose(jitted, expected, rtol=2e-5, atol=2e-5)


def test_a_method_of_the_model_itself():
    base = Codec()
    given = base.init(jax.random.key(0), X, method="both")
    model = RandLora(base, CONFIG, parameters={"w": (0,)})
    adapted = model.adapt(given, X, method="encode")
    trained = {**adapted, "randlora": randomised(adapted["randlora"])}
    merged = {"params": model.merge(trained)}
    for method in ("encode", "both"):
        actual = model.apply(trained, X, method=method)
        expected = base.apply(merged, X, method=method)
        assert np.abs(expected - base.apply(given, X, method=method)).max() > 1e-3
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def test_scales_of_layers_that_the_parameters_lack_are_passed_over():
    base = Model(Codec, lambda m, x: m.both(x))
    model = RandLora(base, CONFIG, parameters={"layer.w": (0,)})
    variables = model.init(jax.random.key(0), X)
    whole = {**variables, "randlora": {**variables["randlora"], "gone": variables["randlora"]}}
    np.testing.assert_array_equal(model.apply(whole, X), model.apply(variables, X))


@pytest.mark.parametrize("strategy", ["merged", "factored"])
@pytest.mark.parametrize("name", NNX)
def test_nnx_applies_what_it_merges(name, strategy):
    make, use, parameters = NNX[name]
    model = NnxModel(make(), use)
    before = model(X)
    inject(model, CONFIG, parameters=parameters, strategy=strategy)
    np.testing.assert_array_equal(model(X), before)
    values = variables(model)
    update(model, {**values, "randlora": randomised(values["randlora"])})
    actual, jitted = model(X), nnx.jit(lambda m, x: m(x))(model, X)
    merge(model)
    assert np.abs(model(X) - before).max() > 1e-3
    np.testing.assert_allclose(actual, model(X), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(jitted, model(X), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("features", [D, 7])
def test_dropout_leaves_other_methods_alone(features):
    config = CONFIG.replace(randlora_dropout=0.5)
    base = Model(lambda: Attends(features), lambda m, x: m.attend(m(x)))
    called = Model(lambda: Attends(features), lambda m, x: m(x))
    given, rngs = base.init(jax.random.key(0), X), {"dropout": jax.random.key(1)}
    model = RandLora(base, config, deterministic=False)
    adapted = model.adapt(given, X)
    np.testing.assert_array_equal(model.apply(adapted, X, rngs=rngs), base.apply(given, X))
    trained = {**adapted, "randlora": randomised(adapted["randlora"])}
    hidden = RandLora(called, config, deterministic=False).apply(trained, X, rngs=rngs)
    whole = RandLora(called, config, deterministic=True).apply(trained, X)
    assert np.abs(hidden - whole).max() > 1e-3
    expected = hidden @ model.merge(trained, X)["layer"]["kernel"].T
    actual = model.apply(trained, X, rngs=rngs)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)
