"""What the README's blocks for NNX leave to their reader, as a typed script would have it."""

import pathlib

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import randlora_jax as rl


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.q_proj = nnx.Linear(8, 16, rngs=rngs)
        self.v_proj = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.v_proj(self.q_proj(x))


model, another_model = Model(nnx.Rngs(0)), Model(nnx.Rngs(0))
config = rl.RandLoraConfig(r=32, target_modules=["q_proj", "v_proj"])
learning_rate = optax.constant_schedule(1e-2)
path, folder = pathlib.Path("adapter"), pathlib.Path("steps")


mesh = jax.make_mesh((4, 2), ("data", "model"))
batch = jnp.ones((8, 8))


def put(array: jax.Array, *axes: str) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
