"""What else a Linen model has: collections, random streams, methods, parents, dtypes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from randlora_jax import RandLoraConfig
from randlora_jax.linen import RandLora
from tests.linen_cases import (
    Case,
    R,
    as_numpy,
    assert_close,
    assert_same_bits,
    normal,
    randomised,
)
from tests.linen_models import (
    PLAIN,
    Block,
    Dropped,
    Normalised,
    Scan,
    Setup,
)

X = normal(0, 4, 5)
CONFIG = RandLoraConfig(r=R, randlora_alpha=2.0, target_modules="all-linear")
KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}


def both(base, *args, rngs=KEYS, **kwargs):
    """The adapted model, and the variables of `init` with and without the adapter."""
    model = RandLora(base, CONFIG)
    return model, model.init(rngs, *args, **kwargs), base.init(rngs, *args, **kwargs)


def train(variables):
    return {**variables, "randlora": randomised(variables["randlora"])}


def only(variables, others):
    return {name: variables[name] for name in others}


# Collections that a call changes


def test_batch_statistics_start_and_move_as_without_the_adapter():
    model, variables, base_variables = both(Normalised(), X)
    assert_same_bits(only(variables, base_variables), base_variables)
    actual = model.apply(variables, X, mutable=["batch_stats"])
    assert_same_bits(actual, model.base.apply(base_variables, X, mutable=["batch_stats"]))


def test_batch_statistics_are_those_of_the_adapted_layers():
    model, variables, _ = both(Normalised(), X)
    trained = train(variables)
    actual = model.apply(trained, X, mutable=["batch_stats"])
    merged = {"params": model.merge(trained), "batch_stats": variables["batch_stats"]}
    expected = model.base.apply(merged, X, mutable=["batch_stats"])
    assert_close(as_numpy(actual), as_numpy(expected), 2e-5)


def test_captured_intermediates_are_those_of_the_base():
    model, variables, base_variables = both(Block(), X)
    _, actual = model.apply(variables, X, capture_intermediates=True)
    _, expected = model.base.apply(base_variables, X, capture_intermediates=True)
    assert_same_bits(actual, expected)


def test_a_cache_starts_empty_and_decodes_as_the_merged_model_does():
    tokens = normal(0, 2, 3, 5)
    base = nn.MultiHeadDotProductAttention(3, qkv_features=6, decode=True)
    model, variables, base_variables = both(base, tokens)
    assert_same_bits(only(variables, base_variables), base_variables)
    trained = train(variables)
    params = model.merge(trained, tokens[:, :1])
    state = other = {"cache": variables["cache"]}
    for i in range(2):
        token = tokens[:, i : i + 1]
        y, state = model.apply({**trained, **state}, token, mutable=["cache"])
        z, other = base.apply({"params": params, **other}, token, mutable=["cache"])
        assert_close(as_numpy((y, state)), as_numpy((z, other)), 2e-5)


# Random streams


@pytest.mark.parametrize("base", [Dropped(), Scan(Dropped)], ids=["plain", "in a stack"])
def test_the_bases_own_dropout_draws_the_same_masks(base):
    model, variables, base_variables = both(base, X)
    assert_same_bits(variables["params"], base_variables["params"])
    rngs = {"dropout": jax.random.key(5)}
    y = model.apply(variables, X, rngs=rngs)
    assert_same_bits(y, base.apply(base_variables, X, rngs=rngs))
    assert bool((y == 0).any())


def test_adapting_needs_no_random_stream():
    base_variables = Dropped().init(KEYS, X)
    adapted = RandLora(Dropped(), CONFIG).adapt(base_variables, X)
    assert set(adapted["randlora"]) == {"up", "down"}


# Methods


@pytest.mark.parametrize(
    "method",
    ["encode", Setup.encode, Setup().encode, lambda module, x: module.encode(x)],
    ids=["name", "function", "bound", "lambda"],
)
def test_methods_of_the_base_are_adapted(method):
    model, variables, base_variables = both(Setup(), X)
    before = model.apply(variables, X, method=method)
    assert_same_bits(before, model.base.apply(base_variables, X, method="encode"))
    trained = train(variables)
    y = model.apply(trained, X, method=method)
    expected = model.base.apply({"params": model.merge(trained)}, X, method="encode")
    assert_close(as_numpy(y), as_numpy(expected), 2e-5)
    assert not np.allclose(y, before)


def test_init_of_a_method_adapts_what_the_method_calls():
    _, variables, base_variables = both(Setup(), X, method="encode")
    assert_same_bits(variables["params"], base_variables["params"])
    assert set(variables["randlora"]) == {"up"}


def test_a_model_that_is_adapted_already_is_refused():
    with pytest.raises(ValueError, match="RandLora already: name its adapters"):
        RandLora(RandLora(Block(), CONFIG), CONFIG)


def test_an_unknown_method_raises_and_names_it():
    model, variables, _ = both(Setup(), X)
    with pytest.raises(ValueError, match="method='enocde' is none of Setup's methods"):
        model.apply(variables, X, method="enocde")


# Dtypes

DTYPES = {  # dtype of the layer, of its parameters, and of the input; tolerance
    "mixed bfloat16": (jnp.bfloat16, jnp.float32, jnp.float32, 0.02),
    "mixed float16": (jnp.float16, jnp.float32, jnp.float32, 0.003),
    "all bfloat16": (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, 0.02),
    "bfloat16 parameters, float32 arithmetic": (jnp.float32, jnp.bfloat16, jnp.float32, 0.01),
    "bfloat16 by promotion": (None, jnp.bfloat16, jnp.bfloat16, 0.02),
}


@pytest.mark.parametrize("name", DTYPES)
def test_any_dtype_keeps_the_base_and_gives_output_and_gradients_to_its_precision(name):
    dtype, param_dtype, input_dtype, tolerance = DTYPES[name]
    base = nn.Dense(7, dtype=dtype, param_dtype=param_dtype)
    case = Case(base, (X.astype(input_dtype),), PLAIN, exact=nn.Dense(7))
    assert_same_bits(case.variables["params"], case.base_variables["params"])
    y = case.model.apply(case.variables, *case.args)
    assert_same_bits(y, base.apply(case.base_variables, *case.args))
    assert {s.dtype for s in jax.tree.leaves(case.variables["randlora"])} == {jnp.dtype("float32")}
    assert_close(case.actual[0], case.expected[0], tolerance)
    assert_close(case.actual[1], case.expected[1], 2 * tolerance)
