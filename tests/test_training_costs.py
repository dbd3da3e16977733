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
from tests.compiling import shipped_jit

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
    return shipped_jit(step).lower(trainable, state, frozen, X).compile()


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
    count = lambda f: shipped_jit(f).lower(VARIABLES, tokens).compile().cost_analysis()["flops"]
    assert count(mapped) == pytest.approx(count(whole), rel=0.02)


def test_microbatches_share_one_update_where_the_merged_kernels_are_made_first():
    config = RandLoraConfig(r=16, target_modules="all-linear")
    model = RandLora(Layers(), config, strategy="merged")
    variables = model.init(jax.random.key(0), jnp.ones((1, FEATURES)))
    variables["randlora"] = jax.tree.map(lambda a: a + 0.01, variables["randlora"])
    trainable, frozen = rl.split(variables, config)
    batches = jax.random.normal(jax.random.key(1), (8, TOKENS, FEATURES))

    def accumulated(apply, weights, batches):
        one = lambda total, x: (total + jnp.mean(jnp.square(apply(weights, x))), None)
        # A loop that is unrolled, since XLA counts the body of a loop once.
        return jax.lax.scan(one, 0.0, batches, unroll=True)[0] / len(batches)

    def merged_first(trainable, batches):
        params = model.merge(rl.combine(trainable, frozen))
        return accumulated(Layers().apply, {"params": params}, batches)

    each = lambda trainable, x: accumulated(model.apply, rl.combine(trainable, frozen), x)
    steps = [shipped_jit(jax.value_and_grad(loss)) for loss in (each, merged_first)]
    for expected, got in zip(
        *map(jax.tree.leaves, (f(trainable, batches) for f in steps)), strict=True
    ):
        assert jnp.allclose(got, expected, rtol=1e-3, atol=1e-7)
    costs = [f.lower(trainable, batches).compile().cost_analysis()["flops"] for f in steps]
    m = lambda sides: 16 * math.ceil(min(sides) / 16)
    first, *others = (2 * math.prod(sides) * m(sides) for sides in KERNELS)
    # Dropped: 7 of 8 builds forward, and 7 of 8 contractions; and all 8 builds of the backward
    # passes, which the first layer has none of, since nothing before it trains.
    assert costs[0] - costs[1] > 0.95 * ((7 + 7) * first + (7 + 7 + 8) * sum(others))


def test_a_merged_model_computes_what_the_base_does():
    params = jax.eval_shape(MODEL.merge, VARIABLES)
    count = lambda params: (
        shipped_jit(Layers().apply).lower({"params": params}, X).compile().cost_analysis()["flops"]
    )
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), VARIABLES["params"]
    )
    assert count(params) == count(VARIABLES["params"])
