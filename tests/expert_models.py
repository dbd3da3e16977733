"""Mixtures of experts as people write them: kernels (experts, in, out), used in every way."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import lax

from randlora_jax import register_layer

EXPERTS, D, F = 4, 6, 9
INIT = nn.initializers.normal(0.5)
SHAPES = {"gate": (EXPERTS, D, F), "out": (EXPERTS, F, D)}
EQUATIONS = {"gate": "ecd,edf->ecf", "out": "ecf,efd->ecd"}


def by_loop(x, gate, out):
    """x (experts, tokens, D), one expert after the other."""
    return jnp.stack([nn.gelu(x[i] @ gate[i]) @ out[i] for i in range(EXPERTS)])


def by_einsum(x, gate, out):
    return jnp.einsum(EQUATIONS["out"], nn.gelu(jnp.einsum(EQUATIONS["gate"], x, gate)), out)


def by_ragged_dot(x, gate, out):
    """The same as groups of rows, as a router sorts them."""
    sizes = jnp.full(EXPERTS, x.shape[1], jnp.int32)
    rows = nn.gelu(lax.ragged_dot(x.reshape(-1, x.shape[-1]), gate, sizes))
    return lax.ragged_dot(rows, out, sizes).reshape(x.shape)


WAYS = {"loop": by_loop, "einsum": by_einsum, "ragged_dot": by_ragged_dot}


class Raw(nn.Module):
    """Experts in raw parameters, which belong to no layer."""

    way: str = "loop"

    @nn.compact
    def __call__(self, x):
        return WAYS[self.way](x, *(self.param(n, INIT, shape) for n, shape in SHAPES.items()))


class Registered(Raw):
    """The same, of a class that is registered with its two kernels."""


register_layer(Registered, EQUATIONS)


class Moe(nn.Module):
    """Flax's own layers: an Einsum and a DenseGeneral over experts."""

    @nn.compact
    def __call__(self, x):
        x = nn.Einsum(SHAPES["gate"], EQUATIONS["gate"], bias_init=INIT, name="gate")(x)
        return nn.DenseGeneral(D, batch_dims=(0,), bias_init=INIT, name="out")(nn.gelu(x))


class Scanned(nn.Module):
    """Three of them, one after the other."""

    layer: type[nn.Module] = Moe

    @nn.compact
    def __call__(self, x):
        step = lambda layer, x, _: (x + layer(x), None)
        scan = nn.scan(
            nn.remat(step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan(self.layer(name="moe"), x, None)[0]


class Named(nn.Module):
    """As gemma's Einsum: the name of its kernel is an attribute."""

    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param(self.weight_name, INIT, self.shape))


register_layer(Named, lambda layer: layer.weight_name, plain=True)


class SharedScope(nn.Module):
    """As gemma's feed-forward: two layers whose parameters are at its own level."""

    @nn.compact
    def __call__(self, x):
        gate, out = Named((2, F, D), "gating_einsum"), Named((F, D), "linear")
        nn.share_scope(self, gate)
        gate, up = gate("...d,kfd->k...f", x)
        nn.share_scope(self, out)
        return out("...f,fd->...d", nn.gelu(gate) * up)


class NnxRaw(nnx.Module):
    """Experts in raw parameters of NNX."""

    def __init__(self, way="loop", *, rngs):
        self.way = way
        for name, shape in SHAPES.items():
            setattr(self, name, nnx.Param(0.5 * rngs.params.normal(shape)))

    def __call__(self, x):
        return WAYS[self.way](x, self.gate[...], self.out[...])


class NnxRegistered(NnxRaw):
    """The same, of a class that is registered with its two kernels."""


register_layer(NnxRegistered, lambda layer: EQUATIONS)


class NnxScanned(nnx.Module):
    """A stack of three layers, run one after the other."""

    def __init__(self, layer=NnxRegistered, *, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return layer(rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        run = lambda x, layer: x + layer(x)
        return nnx.scan(nnx.remat(run), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
