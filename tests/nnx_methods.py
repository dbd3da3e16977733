"""NNX modules that use their kernels otherwise than in one call of a layer of Flax's."""

import functools

import jax.numpy as jnp
from flax import nnx

from randlora_jax import register_layer
from tests.linen_cases import normal
from tests.linen_methods import D, project


class NnxCodec(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(normal(1, D, 7))

    def encode(self, x):
        return self._product(x)

    def _product(self, x):
        return project(x, self.w[...])

    def decode(self, z):
        return z @ self.w[...].T


class NnxTwice(nnx.Linear):
    def __init__(self):
        super().__init__(D, 7, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return super().__call__(x) @ self.kernel[...].T


class NnxHelped(nnx.Module):
    eqn = "bd,df->bf"

    def __init__(self):
        self.w = nnx.Param(normal(1, D, D))

    def __call__(self, x):
        return self.product(x)

    def product(self, x):
        return jnp.einsum(self.eqn, x, self.w[...])


register_layer(NnxHelped, kernel="w", plain=True)


class NnxModel(nnx.Module):
    def __init__(self, layer, use):
        self.layer, self.use = layer, use

    def __call__(self, x):
        return self.use(self.layer, x)


class NnxPlain(nnx.Module):
    eqn = "bd,df->bf"

    def __init__(self):
        self.w = nnx.Param(normal(1, D, D))

    def __call__(self, x):
        return jnp.einsum(self.eqn, x, self.w[...])

    def back(self, y):
        return y @ self.w[...].T

    def scaled(self, x, factor):
        return self(x) * factor

    twice = functools.partialmethod(scaled, factor=2.0)

    def __matmul__(self, x):
        return x @ self.w[...]

    @staticmethod
    def helper(x):
        return x


register_layer(NnxPlain, kernel="w", plain=True)


# (what makes the module, how it is used, the raw parameters to adapt)
NNX = {
    "encode and decode": (NnxCodec, lambda m, x: m.decode(m.encode(x)), {"layer.w": (0,)}),
    "a private method": (NnxCodec, lambda m, x: m._product(x), {"layer.w": (0,)}),
    "the kernel used twice": (NnxTwice, lambda m, x: m(x), {}),
    "methods within a call": (NnxHelped, lambda m, x: m(x), {}),
    "an embedding attended to": (
        lambda: nnx.Embed(D, D, rngs=nnx.Rngs(0)),
        lambda m, x: m.attend(x),
        {"layer.embedding": (1,)},
    ),
    "another method of a plain layer": (NnxPlain, lambda m, x: m.back(m(x)), {}),
    "a partial method": (NnxPlain, lambda m, x: m.helper(m.twice(x)), {}),
    "an operator": (NnxPlain, lambda m, x: m @ x, {}),
}
