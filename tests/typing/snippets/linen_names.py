"""What the README's blocks for Linen leave to their reader, as a typed script would have it."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Model(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(16, name="v_proj")(nn.Dense(16, name="q_proj")(x))


class Moe(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


dispatched = jnp.ones((4, 3, 8))


def loss_of(y: Any) -> jax.Array:
    return jnp.mean(jnp.square(y - 1))


base_model: nn.Module = Model()
x = batch = jnp.ones((8, 8))
microbatches = jnp.stack([x, x])
pretrained = base_model.init(jax.random.key(0), x)["params"]
path, folder, new_folder = (pathlib.Path(name) for name in ("adapter", "steps", "for_peft"))
