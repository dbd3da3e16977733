"""A model in Linen and in NNX, to be adapted or refused: two blocks, a head, a raw parameter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax.linen import RandLora
from randlora_jax.nnx import inject, variables
from tests.linen_cases import normal
from tests.linen_models import Block
from tests.nnx_models import unchanged_if_it_fails

X = normal(0, 2, 5)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.normal(), (5, 5))
        for i in range(2):
            x = Block(name=f"layers_{i}")(x)
        return nn.Dense(3, name="head")(x @ scale)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.scale = nnx.Param(rngs.normal((5, 5)))
        self.layers_0, self.layers_1 = NnxBlock(rngs), NnxBlock(rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.layers_1(self.layers_0(x)) @ self.scale[...])


ALL = {"r": 3, "target_modules": "all-linear"}


def linen(config, change=lambda a: a, **options):
    """The variables of a Linen model, adapted; `change` is applied to its kernels."""
    params = Model().init(jax.random.key(0), X)["params"]
    change_kernels = lambda path, a: change(a) if path[-1].key in ("kernel", "scale") else a
    params = jax.tree.map_with_path(change_kernels, params)
    return RandLora(Model(), config, **options).adapt({"params": params}, X)


def in_place(config, change=lambda a: a, **options):
    """The same of an NNX model, which is as it was if it fails."""
    model = NnxModel()
    for path, variable in nnx.iter_graph(model):
        if path and path[-1] in ("kernel", "scale") and isinstance(variable, nnx.Variable):
            variable.set_value(change(variable.get_value()))
    with unchanged_if_it_fails(model):
        return variables(inject(model, config, **options))
