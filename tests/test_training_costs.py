"""What a compiled training step computes and holds for what is frozen: nothing. No clocks."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import randlora_jax as rl
from randlora_jax import RandLoraConfig
from randlora_jax.linen import RandLora

WIDTHS = (192, 160, 224)  # of three layers, on 32 tokens of 128 features
TOKENS, FEATURES = 32, 128


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in WIDTHS:
            x = nn.tanh(nn.Dense(width, use_bias=False)(x))
        return x


CONFIG = RandLoraConfig(r=16, target_modules="all-linear")
MODEL = RandLora(Layers(), CONFIG, strategy="factored")
X = jax.ShapeDtypeStruct((TOKENS, FEATURES), jnp.float32)
VARIABLES = jax.eval_shape(MODEL.init, jax.random.key(0), X)
KERNELS = list(zip((FEATURES, *WIDTHS), WIDTHS, strict=False))
KERNEL_BYTES = 4 * sum(math.prod(sides) for sides in KERNELS)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache
def compiled(way):
    """A step of Adam: on the "split" tree, on the "partition"ed one, or on "everything"."""
    trainable, frozen = rl.split(VARIABLES, CONFIG) if way == "split" else (VARIABLES, {})
    tx = optax.adam(1e-3)
    if way == "partition":
        tx = rl.partition(tx, VARIABLES, CONFIG)
    elif way == "everything":
        floats = {k: v for k, v in VARIABLES.items() if k != "randlora_bases"}
        trainable, frozen = floats, {"randlora_bases": VARIABLES["randlora_bases"]}

    def step(trainable, state, frozen, x):
        loss = lambda t: jnp.mean(jnp.square(MODEL.apply(rl.combine(t, frozen), x)))
        value, grads = jax.value_and_grad(loss)(trainable)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
            updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state = jax.eval_shape(tx.init, trainable)
    return jax.jit(step).lower(trainable, state, frozen, X).compile()


def flops(way):
    return compiled(way).cost_analysis()["flops"]


def memory(way):
    return compiled(way).memory_analysis()


def test_a_step_on_the_split_tree_computes_no_gradient_of_a_frozen_kernel():
    gradients = sum(2 * TOKENS * math.prod(sides) for sides in KERNELS)
    assert flops("everything") - flops("split") > 0.99 * gradients


def test_a_step_on_the_partitioned_tree_computes_what_one_on_the_split_tree_does():
    assert flops("partition") == pytest.approx(flops("split"), rel=0.02)


def test_a_step_on_the_split_tree_returns_three_times_what_trains_and_nothing_frozen():
    trainable, _ = rl.split(VARIABLES, CONFIG)
    scalars = 2 * 4  # the loss and the count of steps
    returned = memory("split").output_size_in_bytes
    assert 3 * nbytes(trainable) + scalars <= returned < 3 * nbytes(trainable) + 1024


@pytest.mark.parametrize("way", ["split", "partition"])
def test_the_arguments_of_a_step_hold_no_moments_of_what_is_frozen(way):
    trainable, _ = rl.split(VARIABLES, CONFIG)
    held = nbytes(VARIABLES) + 2 * nbytes(trainable) + nbytes(X)
    given = memory(way).argument_size_in_bytes
    assert held <= given < held + 1024
    assert memory("everything").argument_size_in_bytes > given + 1.9 * KERNEL_BYTES


def test_a_step_on_the_split_tree_takes_less_room_by_the_kernels_moments():
    # Results count too: their room serves the gradients before it is written.
    room = lambda way: memory(way).temp_size_in_bytes + memory(way).output_size_in_bytes
    assert room("everything") - room("split") > 2 * KERNEL_BYTES


def test_a_map_over_examples_builds_each_update_once():
    tokens = jax.ShapeDtypeStruct((4, TOKENS, FEATURES), jnp.float32)
    model = RandLora(Layers(), CONFIG, strategy="merged")
    whole = lambda variables, x: model.apply(variables, x)
    mapped = lambda variables, x: jax.vmap(lambda x: model.apply(variables, x))(x)
    count = lambda f: jax.jit(f).lower(VARIABLES, tokens).compile().cost_analysis()["flops"]
    assert count(mapped) == pytest.approx(count(whole), rel=0.02)
