"""Which layers of an NNX model are adapted, and which of several adapters act."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax.nnx import RandLoraParam, inject, merge, set_active, variables
from tests.nnx_models import CONFIG, MLP, Stack, assert_close, trained, x


def test_layers_of_a_stack_that_are_left_out():
    config = CONFIG.replace(
        target_modules=["up", "down"], layers_to_transform=[2, 0], layers_pattern="blocks"
    )
    make = lambda: Stack(rngs=nnx.Rngs(0))
    model = trained(make(), config)
    scales = variables(model)["randlora"]["blocks"]["up"]
    assert scales["randlora_lambda"].shape[0] == 2
    grads = nnx.grad(lambda m: jnp.sum(m(x()) ** 2), argnums=nnx.DiffState(0, RandLoraParam))(model)
    for grad in jax.tree.leaves(grads):
        assert bool((grad[1] == 0).all()) and bool((grad[0] != 0).any())
    # As if the middle layer's update were zero: merging by Linen's own rule.
    y, before = model(x()), make().blocks.up.kernel[...]
    merge(model)
    assert_close(np.asarray(model(x())), np.asarray(y), 1e-5)
    same = [bool((a == b).all()) for a, b in zip(model.blocks.up.kernel[...], before, strict=True)]
    assert same == [False, True, False]


def test_layers_of_a_list_that_are_left_out():
    config = CONFIG.replace(target_modules=["up"], layers_to_transform=1)
    model = inject(MLP(rngs=nnx.Rngs(0)), config)
    assert list(variables(model)["randlora"]["layers"]) == ["1"]


def test_several_adapters_switch_sum_and_merge():
    configs = {
        "a": CONFIG.replace(target_modules=["up"]),
        "b": CONFIG.replace(target_modules=["up", "head"], randlora_alpha=5.0),
    }
    make = lambda: MLP(rngs=nnx.Rngs(0))
    model = trained(make(), configs)
    values, y = variables(model), model(x())
    for name in configs:
        set_active(model, (name,))
        one, config = rl.adapters.select(values, configs, name)
        alone = inject(make(), config, values=one)
        assert_close(np.asarray(model(x())), np.asarray(alone(x())), 1e-6)
    set_active(model, ())
    np.testing.assert_array_equal(model(x()), make()(x()))
    set_active(model, None)
    np.testing.assert_array_equal(model(x()), y)
    assert_close(np.asarray(merge(model)(x())), np.asarray(y), 1e-5)
    with pytest.raises(ValueError, match="projection_prng_key"):
        inject(make(), {**configs, "c": CONFIG.replace(projection_prng_key=1)})
    with pytest.raises(ValueError, match="'c'"):
        inject(make(), configs, active=("c",))
