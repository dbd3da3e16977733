"""Every kind of NNX layer and model: how it is made, its kernels and its input's shape."""

import jax.numpy as jnp
from flax import nnx

from tests.nnx_models import MLP, D, OwnEinsum, PlainEinsum, Stack


class Loud(nnx.Linear):
    """A subclass with an argument of its own, which calls its super."""

    def __call__(self, x, *, gain=1.0):
        return jnp.tanh(super().__call__(gain * x))


class Own(nnx.Linear):
    """A subclass that ignores its attribute `dot_general`, and has a second method."""

    def __call__(self, x):
        return jnp.sin(x @ self.kernel[...])

    def transposed(self, y):
        return y @ self.kernel[...].T


class Einsum(nnx.Einsum):
    """One with a fixed equation for each shape."""


class Gated(nnx.Module):
    """A raw parameter that belongs to no layer: (gates, features, in)."""

    def __init__(self, *, rngs):
        self.gating = nnx.Param(rngs.normal((2, 3, D)))

    def __call__(self, x):
        gate, up = jnp.einsum("bi,goi->gbo", x, self.gating[...])
        return jnp.tanh(gate) * up


def attention(**options):
    return nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0), **options)


HEADS = {f"{n}/kernel": ((0,), ()) for n in ("query", "key", "value")}
# name: (how the base is made, its adapted kernels, the input's shape, how it is called)
CASES = {
    "linear": (lambda: nnx.Linear(D, 8, rngs=nnx.Rngs(0)), {"kernel": ((0,), ())}, (5, D)),
    "tall": (lambda: nnx.Linear(8, D, rngs=nnx.Rngs(0)), {"kernel": ((0,), ())}, (2, 3, 8)),
    "general": (
        lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(1, -1), rngs=nnx.Rngs(0)),
        {"kernel": ((0, 1), ())},
        (7, 2, 3),
    ),
    "one_token": (
        lambda: nnx.LinearGeneral(D, (4, 5), rngs=nnx.Rngs(0)),
        {"kernel": ((0,), ())},
        (D,),
    ),
    "subclass": (lambda: Loud(D, 8, rngs=nnx.Rngs(0)), {"kernel": ((0,), ())}, (5, D)),
    "no_door": (
        lambda: Own(D, 8, use_bias=False, rngs=nnx.Rngs(0)),
        {"kernel": ((0,), ())},
        (5, D),
    ),
    "einsum": (
        lambda: Einsum("bti,oin->bton", (4, D, 3), (4, 3), rngs=nnx.Rngs(0)),
        {"kernel": ((1,), ())},
        (2, 5, D),
    ),
    "einsum_dots": (
        lambda: Einsum("...hi,hio->...o", (2, D, 3), rngs=nnx.Rngs(0)),
        {"kernel": ((0, 1), ())},
        (2, 5, 2, D),
    ),
    "einsum_order": (
        lambda: Einsum("bti,io->obt", (D, 4), rngs=nnx.Rngs(0)),
        {"kernel": ((0,), ())},
        (2, 5, D),
    ),
    "own_einsum": (
        lambda: OwnEinsum("bti,oin->bton", (4, D, 3), rngs=nnx.Rngs(0)),
        {"w": ((1,), ())},
        (2, 5, D),
    ),
    "plain_einsum": (
        lambda: PlainEinsum("bti,oin->bton", (4, D, 3), rngs=nnx.Rngs(0)),
        {"w": ((1,), ())},
        (1, 2, D),
    ),
    "einsum_experts": (
        lambda: Einsum("ecd,edf->ecf", (4, D, 8), (4, 1, 8), rngs=nnx.Rngs(0)),
        {"kernel": ((1,), (), (0,))},
        (4, 5, D),
    ),
    "einsum_experts_apart": (
        lambda: Einsum("gecd,dekf->kgecf", (D, 4, 2, 8), rngs=nnx.Rngs(0)),
        {"kernel": ((0,), (), (1,))},
        (3, 4, 5, D),
    ),
    "own_experts": (
        lambda: OwnEinsum("gecd,ekfd->kgecf", (4, 2, 3, D), rngs=nnx.Rngs(0)),
        {"w": ((3,), (), (0,))},
        (1, 4, 5, D),
    ),
    "plain_experts": (
        lambda: PlainEinsum("gecd,ekfd->kgecf", (4, 2, 3, D), rngs=nnx.Rngs(0)),
        {"w": ((3,), (), (0,))},
        (1, 4, 1, D),
    ),
    "general_experts": (
        lambda: nnx.LinearGeneral(
            (2, D), (3, 2), axis=(1, -1), batch_axis={0: 4}, rngs=nnx.Rngs(0)
        ),
        {"kernel": ((1, 2), (), (0,))},
        (4, 2, 5, D),
    ),
    "general_batches": (
        lambda: nnx.LinearGeneral(D, 3, batch_axis={0: 4, 1: 2}, rngs=nnx.Rngs(0)),
        {"kernel": ((2,), (), (0, 1))},
        (4, 2, 5, D),
    ),
    "attention": (attention, {**HEADS, "out/kernel": ((0, 1), ())}, (2, 5, D)),
    "list": (
        lambda: MLP(rngs=nnx.Rngs(0)),
        {f"layers/{i}/{n}/kernel": ((0,), ()) for i in (0, 1) for n in ("up", "down")}
        | {"head/kernel": ((0,), ())},
        (5, D),
    ),
    "stack": (
        lambda: Stack(rngs=nnx.Rngs(0)),
        {f"blocks/{n}/kernel": ((0,), (0,)) for n in ("up", "down")} | {"head/kernel": ((0,), ())},
        (5, D),
    ),
    "stack_on_axis_1": (
        lambda: Stack(axis=1, rngs=nnx.Rngs(0)),
        {f"blocks/{n}/kernel": ((0,), (1,)) for n in ("up", "down")} | {"head/kernel": ((0,), ())},
        (5, D),
    ),
}
