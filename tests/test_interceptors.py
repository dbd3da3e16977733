"""A user's interceptors and captures see of an adapted model what they see of its base."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import randlora_jax as rl
from randlora_jax.linen import RandLora
from tests.linen_cases import assert_close, normal
from tests.linen_methods import LINEN, D, Decorated

X = normal(0, 4, D)
CONFIG = rl.RandLoraConfig(r=2, randlora_alpha=2.0, target_modules="all-linear")


def changing(seen):
    """An interceptor that notes each call, and does something to what it gives."""

    def run(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if context.method_name == "setup":
            return y
        seen.append((context.module.path, type(context.module).__name__, context.method_name))
        return 2 * y + 1 if hasattr(y, "dtype") else y

    return run


# A raw parameter has no input to drop, and refuses dropout.
CASES = [(name, rate) for name in LINEN for rate in (0.0, 0.5) if not (rate and LINEN[name][1])]


class Inside(nn.Module):
    """A model that has an interceptor of its own."""

    make: Any

    @nn.compact
    def __call__(self, x):
        def double(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            return 2 * y if context.module.name == "layer" else y

        with nn.intercept_methods(double):
            return self.make(name="layer")(x)


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("make", [lambda name: nn.Dense(7, name=name), Decorated], ids=["", "own"])
def test_those_of_the_model_itself_act_too(make, rate):
    base = Inside(make)
    model = RandLora(base, CONFIG.replace(randlora_dropout=rate))
    variables = model.adapt(base.init(jax.random.key(0), X), X)
    expected, seen = base.apply({"params": variables["params"]}, X), []
    rngs = {"dropout": jax.random.key(1)}
    actual = model.apply(variables, X, deterministic=not rate, rngs=rngs)
    assert_close(np.asarray(actual), np.asarray(expected), 1e-5)
    with nn.intercept_methods(changing(seen)):
        actual = model.apply(variables, X, deterministic=not rate, rngs=rngs)
    assert [path for path, *_ in seen] == [("layer",), ()]


@pytest.mark.parametrize(("name", "rate"), CASES)
def test_they_see_the_same_calls_once(name, rate):
    base, parameters = LINEN[name]
    model = RandLora(base, CONFIG.replace(randlora_dropout=rate), parameters=parameters)
    variables = model.adapt(base.init(jax.random.key(0), X), X)
    params = {"params": variables["params"]}
    rngs = {"dropout": jax.random.key(1)}
    expected_calls, calls = [], []
    with nn.intercept_methods(changing(expected_calls)):
        expected = base.apply(params, X)
    with nn.intercept_methods(changing(calls)):
        actual = model.apply(variables, X, deterministic=not rate, rngs=rngs)
    assert calls == expected_calls
    assert_close(np.asarray(actual), np.asarray(expected), 1e-5)

    capture = {"capture_intermediates": True}
    expected, captured = base.apply(params, X, **capture)
    actual, also = model.apply(variables, X, deterministic=not rate, rngs=rngs, **capture)
    assert jax.tree.structure(also) == jax.tree.structure(captured)
    assert_close(also, captured, 1e-5)
