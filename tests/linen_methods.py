"""Linen models that use their kernels otherwise than in one call of a layer of Flax's."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from randlora_jax import register_layer
from tests.linen_models import ScanLayer

D = 5
NORMAL = nn.initializers.normal(1.0)


def project(x, kernel):
    return jnp.tanh(x @ kernel)


class Codec(nn.Module):
    """A raw parameter that two methods use, and no call."""

    def setup(self):
        self.w = self.param("w", NORMAL, (D, 7))

    def encode(self, x):
        return self._product(x)

    def _product(self, x):
        return project(x, self.w)

    def decode(self, z):
        return z @ self.w.T

    def both(self, x):
        return self.decode(self.encode(x))


class Twice(nn.Dense):
    """A Dense that multiplies by its kernel once as its class does, and once in its own way."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x) @ self.variables["params"]["kernel"].T


class Attends(nn.Dense):
    """A Dense with a second method, as nn.Embed has one."""

    def attend(self, y):
        return y @ self.variables["params"]["kernel"].T


class Helped(nn.Module):
    """An Einsum layer whose call is made of methods of its own."""

    @nn.compact
    def __call__(self, equation, x):
        return self.product(equation, x, self.param("w", NORMAL, (D, D)))

    def product(self, equation, x, w):
        return jnp.einsum(equation, x, w)

    def of_kernel(self, x):
        return x @ self.variables["params"]["w"]


register_layer(Helped, kernel="w", plain=True)


def wraps_without_telling(method):
    return lambda self, x: method(self, x)


class Decorated(nn.Module):
    """A layer whose call is hidden behind a decorator that does not keep its name."""

    @nn.compact
    @wraps_without_telling
    def __call__(self, x):
        return x @ self.param("kernel", NORMAL, (D, D))


register_layer(Decorated)


class Model(nn.Module):
    """Calls a layer of a class by several of its methods."""

    make: Any
    use: Any

    def setup(self):
        self.layer = self.make()

    def __call__(self, x):
        return self.use(self.layer, x)


class TiedHead(nn.Module):
    """As transformers tie their heads: the layer's own apply, with a kernel from elsewhere."""

    def setup(self):
        self.wte, self.mlp = nn.Embed(11, D), nn.Dense(D)
        self.head = nn.Dense(11, use_bias=False)

    def __call__(self, x):
        kernel = self.wte(jnp.arange(11)).T
        return self.head.apply({"params": {"kernel": kernel}}, self.mlp(x))


class Unbound(nn.Module):
    """A model that takes its own layer out of its scope, as Flax's `unbind` does it."""

    def setup(self):
        self.layer = nn.Dense(D)

    def __call__(self, x):
        y = self.layer(x)
        layer, variables = self.layer.unbind()
        return (
            y
            + layer.apply(variables, x)
            + self.layer.clone(parent=None).apply({"params": self.layer.variables["params"]}, 2 * x)
        )


class Casts(nn.Module):
    """An Einsum layer that helps itself with a method, before its call says how it is used."""

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.cast(self.param("w", NORMAL, (3, D, 2))))

    def cast(self, w):
        return w.astype(jnp.float32)

    def norm(self):
        return (
            jnp.sum(self.variables["params"]["w"] ** 2)
            if self.has_variable("params", "w")
            else jnp.zeros(())
        )


register_layer(Casts, kernel="w")


class Fused(nn.Module):
    """One with a kernel of several input axes, and methods that say nothing of them."""

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("kernel", NORMAL, (D, 2, 3)))

    def logged(self, message):
        del message
        return jnp.sum(self.variables["params"]["kernel"])

    def attend(self, equation, y):
        return jnp.einsum(equation, y, self.variables["params"]["kernel"])


register_layer(Fused)


class Scopes(nn.Module):
    """A raw parameter, and a Dense that shares its scope."""

    def setup(self):
        self.dense = nn.Dense(D)
        nn.share_scope(self, self.dense)
        self.raw = self.param("raw", NORMAL, (D, D))

    def __call__(self, x):
        return self.dense(x @ self.raw)


class Owned(nn.Module):
    """A module with an attribute that can't be sorted."""

    table: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(D)(x)


# (the model, the raw parameters to adapt)
LINEN = {
    "encode and decode": (Model(Codec, lambda m, x: m.both(x)), {"layer.w": (0,)}),
    "encode alone": (Model(Codec, lambda m, x: m.encode(x)), {"layer.w": (0,)}),
    "a private method": (Model(Codec, lambda m, x: m._product(x)), {"layer.w": (0,)}),
    "the kernel used twice": (Model(lambda: Twice(7), lambda m, x: m(x)), {}),
    "call and attend": (Model(lambda: Attends(7), lambda m, x: m.attend(m(x))), {}),
    "methods within a call": (Model(Helped, lambda m, x: m("bd,df->bf", x)), {}),
    "a call that transposes": (
        Model(Helped, lambda m, x: m.of_kernel(m("bd,fd->bf", x))),
        {},
    ),
    "a decorated call": (Model(Decorated, lambda m, x: m(x)), {}),
    "an embedding attended to": (
        Model(lambda: nn.Embed(D, D), lambda m, x: m.attend(x)),
        {"layer.embedding": (1,)},
    ),
    "an apply within": (TiedHead(), {}),
    "a lifted function": (ScanLayer(), {}),
    "its own layer, unbound": (Unbound(), {}),
    "a helper before the call": (
        Model(Casts, lambda m, x: m.norm() + m("bd,ndh->bnh", x)),
        {},
    ),
    "methods that don't tell": (
        Model(Fused, lambda m, x: m("bd,dnh->bnh", x) + m.logged("hello, world")),
        {},
    ),
    "another equation elsewhere": (
        Model(Fused, lambda m, x: m.attend("bnh,dnh->bd", m("bd,dnh->bnh", x))),
        {},
    ),
    "a shared scope": (Scopes(), {"raw": (0,)}),
    "odd attributes": (Owned({1: 2, "a": 3}), {}),
}
