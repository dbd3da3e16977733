"""Small Linen models, each with one way of nesting layers. All take and give 5 features."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from randlora_jax import register_layer

KEPT = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
PLAIN = {"kernel": ((0,), ())}


def block_kernels(prefix="", stack=()):
    """The kernels of a `Block` or `Setup` at a path, for `linen_cases.Case`."""
    return {f"{prefix}{name}/kernel": ((0,), stack) for name in ("up", "down")}


class GemmaEinsum(nn.Module):
    """As gemma's: one parameter `w`, the equation comes with the call."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), self.shape))


class PlainEinsum(GemmaEinsum):
    """The same, registered as a plain product."""


register_layer(GemmaEinsum, kernel="w")
register_layer(PlainEinsum, kernel="w", plain=True)


class Conv1D(nn.Module):
    """As Flax's GPT-2 has it: the kernel is (out, in)."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.normal(), (self.features,))
        return x @ kernel.T + jnp.broadcast_to(bias, (*x.shape[:-1], self.features))


register_layer(Conv1D)


class Block(nn.Module):
    """Compact."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(5, name="down")(nn.tanh(nn.Dense(7, name="up")(x)))


class Setup(nn.Module):
    """`setup`, methods beside the call, and layers that are called `times` times."""

    times: int = 1

    def setup(self):
        self.up, self.down = nn.Dense(7), nn.Dense(5)

    def encode(self, x):
        return nn.tanh(self.up(x))

    def __call__(self, x):
        for _ in range(self.times):
            x = x + self.down(self.encode(x))
        return x


class Holds(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.tanh(self.layer(x))


class Shared(nn.Module):
    """One layer in two parents."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5, name="common")
        return Holds(layer, name="a")(x) + Holds(layer, name="b")(2 * x)


class SharesScope(nn.Module):
    """A child whose parameters are at its parent's level."""

    def setup(self):
        self.child, self.own = Child(), nn.Dense(5)
        nn.share_scope(self, self.child)

    def __call__(self, x):
        return self.own(nn.tanh(self.child(x)))


class Child(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(7, name="up")(x)


class Within(nn.Module):
    """One submodule, by a constructor that can be a lifted class."""

    make: Any

    @nn.compact
    def __call__(self, x):
        return self.make(name="inner")(x)


class Carry(nn.Module):
    make: Any = Block

    @nn.compact
    def __call__(self, x, _):
        return self.make(name="inner")(x), None


class Scan(nn.Module):
    """A stack of `make()`, with its layers on `axis`."""

    make: Any = Block
    axis: int = 0
    length: int = 3
    lift: Any = staticmethod(lambda cls: cls)

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            self.lift(Carry),
            variable_axes={"params": self.axis},
            split_rngs={"params": True, "dropout": True},
            length=self.length,
        )
        return layers(self.make, name="layers")(x, None)[0]


class ScanLayer(nn.Module):
    """`nn.scan` of a function around a bare layer.

    XLA may fuse its product with what follows, and round otherwise where an update is added.
    """

    @nn.compact
    def __call__(self, x):
        step = lambda layer, x, _: (nn.tanh(layer(x)), None)
        return nn.scan(step, length=3, **KEPT)(nn.Dense(5, name="layer"), x, None)[0]


class ScanBroadcast(nn.Module):
    """One layer's parameters in every step."""

    @nn.compact
    def __call__(self, x):
        lifted = nn.scan(Carry, variable_broadcast="params", split_rngs={"params": False}, length=3)
        return lifted(name="layers")(x, None)[0]


class Normalised(nn.Module):
    """Batch statistics between two layers."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(7, name="up")(x))
        return nn.Dense(5, name="down")(x)


class Dropped(nn.Module):
    """Dropout of its own, in the call as in a stack."""

    @nn.compact
    def __call__(self, x, deterministic=False):
        x = nn.Dropout(0.5)(nn.Dense(7, name="up")(x), deterministic=deterministic)
        return nn.Dropout(0.5)(nn.Dense(5, name="down")(x), deterministic=deterministic)


class Boxed(nn.Module):
    """Kernels with axis names, physical and logical."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        up = nn.with_partitioning(init, ("embed", "mlp"))
        down = nn.with_logical_partitioning(init, ("mlp", "embed"))
        x = nn.tanh(nn.Dense(7, kernel_init=up, name="up")(x))
        return nn.Dense(5, kernel_init=down, name="down")(x)


class BoxedScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        naming = {nn.PARTITION_NAME: "layers"}
        layers = nn.scan(Carry, length=3, metadata_params=naming, **KEPT)
        return layers(Boxed, name="layers")(x, None)[0]
