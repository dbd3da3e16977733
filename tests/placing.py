"""Bases on a mesh of 8 devices, and a config for them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl

CONFIG = rl.RandLoraConfig(r=4, target_modules="all-linear")
X = jnp.ones((8, 16))
RULES = (("embed", "data"), ("mlp", "model"), ("layers", None))


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def put(array, *axes, on=None):
    return jax.device_put(array, NamedSharding(on or mesh(), P(*axes)))


def linen_variables():
    return {"params": {"kernel": put(jnp.ones((16, 32)), "data", "model")}}


def nnx_linear(*axes, kind=AxisType.Auto):
    layer = nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel.set_value(put(layer.kernel.get_value(), *axes, on=mesh(kind)))
    return layer


def specs(tree):
    return jax.tree.map(lambda a: a.sharding.spec, tree)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = lambda layer, x: (layer(x), None)
        scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scanned(nn.Dense(16, use_bias=False, name="layer"), x)[0]
