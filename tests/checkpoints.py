"""A small adapted model to save, and what tells two of them, or two folders, apart."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora


class MLP(nn.Module):
    hidden: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.hidden, name="up")(x))
        x = nn.relu(nn.Dense(self.hidden, name="mid")(x))
        return nn.Dense(5, name="head")(x)


@functools.cache
def base(hidden=16):
    return MLP(hidden).init(jax.random.key(0), jnp.ones((2, 7)))


def numbers(leaf):
    """What every trained array of the same size and shape is."""
    return jnp.asarray(np.random.default_rng(leaf.size).standard_normal(leaf.shape), leaf.dtype)


def make(seed=3, **values):
    """(trained variables, config): every array that trains is random."""
    config = rl.RandLoraConfig(
        **{"r": 3, "target_modules": ["up", "mid"], "projection_prng_key": seed, **values}
    )
    variables = RandLora(MLP(), config).adapt(base(), jax.ShapeDtypeStruct((2, 7), jnp.float32))
    trainable, frozen = rl.split(variables, config)
    return rl.combine(jax.tree.map(numbers, trainable), frozen), config


@functools.cache
def trained(seed=3):
    return make(seed, bias="all", modules_to_save=["head"])


def bits(variables):
    """{path: (shape, dtype, bytes)} of every array."""
    arrays = {".".join(path): np.asarray(leaf) for path, leaf in trees.items(variables)}
    return {k: (a.shape, str(a.dtype), a.tobytes()) for k, a in arrays.items()}


def files(folder):
    """{path: bytes} of all that is in a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
