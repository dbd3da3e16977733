"""A transformer on meshes of 8 devices, divided as people do it, and what its devices exchange."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

D, F, HEADS = 64, 256, 4
X = (16, 32, D)
WHOLE = P()
SIZES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "u64": 8, "pred": 1}
SIZES |= dict.fromkeys(("s8", "u8", "s4", "u4"), 1)
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def exchanged(compiled) -> dict[str, int]:
    """Bytes of the results of each kind of collective in a compiled function's HLO."""
    total = dict.fromkeys(KINDS.split("|"), 0)
    for shapes, kind in re.findall(rf"= (.*?) ({KINDS})(?:-start)?\(", compiled.as_text()):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            total[kind] += SIZES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
    return total


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the specs of kernels that widen or end a head and of those that close, the batch's.

    Attributes:
      residual, hidden, norm: constraints that the model puts on its own activations.
    """

    mesh: dict[str, int]
    opening: P = WHOLE
    closing: P = WHOLE
    batch: P = WHOLE
    residual: P | None = None
    hidden: P | None = None
    norm: P | None = None

    def devices(self, kind=AxisType.Auto):
        return jax.make_mesh(tuple(self.mesh.values()), tuple(self.mesh), (kind,) * len(self.mesh))


_BOTH = {
    "mesh": {"data": 2, "model": 4},
    "opening": P("data", "model"),
    "closing": P("model", "data"),
    "batch": P("data"),
}
LAYOUTS = {
    "data": Layout({"data": 8}, batch=P("data")),
    "fsdp": Layout({"data": 8}, P("data", None), P("data", None), P("data")),
    "tensor": Layout({"model": 8}, P(None, "model"), P("model", None)),
    "2x2x2": Layout(
        {"data": 2, "fsdp": 2, "model": 2},
        *(P("fsdp", "model"), P("model", "fsdp"), P(("data", "fsdp"))),
    ),
    "tokens": Layout({"data": 8}, batch=P(None, "data")),
    "sequence": Layout(
        {"model": 8}, P(None, "model"), P("model", None), P(None, "model"),
        residual=P(None, "model", None),
    ),
    "data + sequence": Layout(
        **{**_BOTH, "batch": P("data", "model")}, residual=P("data", "model", None)
    ),
    "residual": Layout(**_BOTH, residual=P("data", None, None)),
    "hidden": Layout(**_BOTH, hidden=P("data", None, "model")),
    "norm": Layout(**_BOTH, residual=P("data", "model", None), norm=P("data", None, None)),
}  # fmt: skip
OPENING = ("q", "k", "v", "up")


def constrained(x, spec):
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def block(x, layers, norms, layout, heads=HEADS):
    """One block, of layers and norms by name, whichever front end they are of."""
    split = lambda y: y.reshape(*x.shape[:2], heads, x.shape[2] // heads)
    h = constrained(norms[0](x), layout.norm)
    attended = jax.nn.dot_product_attention(*(split(layers[name](h)) for name in "qkv"))
    x = constrained(x + layers["o"](attended.reshape(x.shape)), layout.residual)
    h = constrained(norms[1](x), layout.norm)
    h = constrained(nn.gelu(layers["up"](h)), layout.hidden)
    return constrained(x + layers["down"](h), layout.residual)


class Block(nn.Module):
    layout: Layout
    sizes: tuple[int, int] = (F, HEADS)

    @nn.compact
    def __call__(self, x):
        (hidden, heads), width = self.sizes, x.shape[-1]
        widths = {**dict.fromkeys("qkvo", width), "up": hidden, "down": width}
        dense = lambda name, width: nn.Dense(width, use_bias=False, name=name)
        layers = {name: dense(name, width) for name, width in widths.items()}
        return block(x, layers, [nn.RMSNorm(), nn.RMSNorm()], self.layout, heads)


class Net(nn.Module):
    layout: Layout
    layers: int = 1
    sizes: tuple[int, int] = (F, HEADS)

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = nn.remat(Block)(self.layout, self.sizes, name=f"block_{i}")(x)
        return x


class NnxNet(nnx.Module):
    """The same in NNX, of one block, with the specs in the metadata of its kernels."""

    def __init__(self, layout, rngs):
        def linear(inputs, outputs, spec):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), spec)
            return nnx.Linear(inputs, outputs, use_bias=False, kernel_init=init, rngs=rngs)

        self.q, self.k, self.v = (linear(D, D, layout.opening) for _ in range(3))
        self.o, self.up = linear(D, D, layout.closing), linear(D, F, layout.opening)
        self.down = linear(F, D, layout.closing)
        self.norms = nnx.List([nnx.RMSNorm(D, rngs=rngs) for _ in range(2)])
        self.layout = layout

    def __call__(self, x):
        layers = {name: getattr(self, name) for name in ("q", "k", "v", "o", "up", "down")}
        return block(x, layers, self.norms, self.layout)


@functools.cache
def _params(layers):
    return Net(Layout({}), layers).init(jax.random.key(0), jnp.ones(X))["params"]


def spec_of(path, value, layout):
    """Where the layout has a parameter."""
    if len(value.shape) < 2:
        return P()
    return layout.opening if path[-2].key in OPENING else layout.closing


def placed_params(layout, mesh, layers=1, dtype=jnp.float32):
    """Parameters of `Net`, each where the layout has it."""

    def put(path, value):
        where = NamedSharding(mesh, spec_of(path, value, layout))
        return jax.device_put(value.astype(dtype), where)

    return jax.tree_util.tree_map_with_path(put, _params(layers))


def batch(layout, mesh, dtype=jnp.float32):
    value = jax.random.normal(jax.random.key(1), X, dtype)
    return jax.device_put(value, NamedSharding(mesh, layout.batch))


def loss(y):
    return jnp.mean(jnp.square(y.astype(jnp.float32)))
