"""What a compiled training step keeps, in bytes: no clocks.

Over the frozen base an adapter must keep the input of every adapted layer, for the gradients of its
scales. Beyond that it may need room for three kernels, whatever the number of layers.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora
from tests.compiling import shipped_jit

LAYERS, WIDTH, HIDDEN = 12, 512, 2048
CONFIG = rl.RandLoraConfig(r=32, target_modules=["up", "down"])
LORA_RANK = 13  # as many parameters as r=32: (512 + 2048) * 13 and 32 * 16 + 16 * 512, times four


class Block(nn.Module):
    """Up and down, with LoRA's two factors beside each kernel if it has a rank."""

    rank: int = 0

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.gelu(self.dense(x, HIDDEN, "up"))
        return x + self.dense(h, WIDTH, "down"), None

    def dense(self, x, features, name):
        y = nn.Dense(features, use_bias=False, name=name)(x)
        if self.rank:
            low = nn.Dense(self.rank, use_bias=False, name=f"{name}_lora_a")(x)
            y = y + nn.Dense(features, use_bias=False, name=f"{name}_lora_b")(low)
        return y


class Stack(nn.Module):
    scan: bool = False
    rank: int = 0

    @nn.compact
    def __call__(self, x):
        if self.scan:
            blocks = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
            )
            return blocks(self.rank)(x, None)[0]
        for _ in range(LAYERS):
            x, _ = Block(self.rank)(x)
        return x


@functools.cache
def temporary(what, tokens, scan):
    """Bytes that a step needs besides its arguments and results."""
    x = jax.ShapeDtypeStruct((tokens, WIDTH), jnp.float32)
    rank = LORA_RANK if what == "lora" else 0
    base = Stack(scan, rank)
    params = jax.eval_shape(base.init, jax.random.key(0), x)["params"]
    if what in ("base", "lora"):
        is_new = lambda path, _: "_lora_" in path[-2]
        trains = trees.filtered(params, is_new) if rank else {}
        frozen = trees.filtered(params, lambda path, leaf: not is_new(path, leaf))
        apply = lambda t, f, x: base.apply({"params": trees.union(f, t)}, x)
    else:
        model = RandLora(base, CONFIG, strategy=what)
        variables = jax.eval_shape(model.adapt, {"params": params}, x)
        trains, frozen = rl.split(variables, CONFIG)
        apply = lambda t, f, x: model.apply(rl.combine(t, f), x)
    # Gradients reach the input, as they do where something before the stack trains.
    loss = lambda t, x, f: jnp.mean(jnp.square(apply(t, f, x)))
    compiled = shipped_jit(jax.value_and_grad(loss, (0, 1))).lower(trains, x, frozen).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("tokens", [128, 2048])
@pytest.mark.parametrize("strategy", ["auto", "merged", "factored"])
def test_a_step_keeps_the_inputs_of_the_layers_and_three_kernels(strategy, tokens, scan):
    inputs = 4 * tokens * (WIDTH + HIDDEN) * LAYERS
    kernels = 3 * 4 * WIDTH * HIDDEN
    if strategy == "factored":  # x.A and its gradient, (tokens, m), of the layer at hand
        kernels += 2 * 4 * tokens * CONFIG.r * math.ceil(WIDTH / CONFIG.r)
    beyond = temporary(strategy, tokens, scan) - temporary("base", tokens, scan)
    assert beyond <= inputs + kernels


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_long_batches_need_no_more_room_than_lora_of_equal_size(scan):
    assert temporary("auto", 2048, scan) <= 1.02 * temporary("lora", 2048, scan)
