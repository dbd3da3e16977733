"""Models with a quantised base, and their twins over the same base in floats."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora, quantize
from randlora_jax.quantised import floats, is_quantised
from tests.linen_cases import normal, randomised

CONFIG = rl.RandLoraConfig(r=8, randlora_alpha=8, target_modules="all-linear")
TYPES = {
    "int8": {"qtype": "int8"},
    "int8 in tiles": {"qtype": "int8", "tile_size": 16},
    "int4": {"qtype": "int4", "tile_size": 8},
    "nf4": {"qtype": "nf4", "tile_size": 16},
    "float8": {"qtype": "float8_e4m3fn"},
}
X = normal(1, 2, 8, 64)


class Dense(nn.Module):
    """Kernels on whose products the compiler does the same sums, whatever is around them."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, name="down")(nn.tanh(nn.Dense(128, name="up")(x)))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(x)
        return nn.DenseGeneral((4, 32), name="heads")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + Dense(name="mlp")(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(nn.remat(Block), length=3, **axes)(name="blocks")(x, None)[0]


class Experts(nn.Module):
    """A stack of kernels inside a layer, and one around it."""

    @nn.compact
    def __call__(self, x):
        x = jnp.stack([x, x + 1])
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x = nn.vmap(nn.Dense, in_axes=0, axis_size=2, **axes)(128, name="lifted")(x)
        return nn.DenseGeneral(64, batch_dims=(0,), name="inside")(x)


class Einsum(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Einsum((64, 4, 32), "...d,dhk->...hk", name="heads")(x)


class Raw(nn.Module):
    """A parameter that belongs to no layer, used twice."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (64, 128))
        return jnp.tanh(x @ w) @ w.T


MODELS = {m.__name__: m() for m in (Dense, Attention, Scanned, Experts, Einsum, Raw)}


def of(name, **fields):
    """An adapted model of the name; all of its kernels, unless the fields say otherwise."""
    raw = {"parameters": {"w": (0,)}} if name == "Raw" else {}
    return RandLora(MODELS[name], CONFIG.replace(**fields), **raw)


def variables_of(model, x=X, trained=True, **how):
    """(with a quantised base, with its floats), their scales alike and away from their start."""
    params = nn.unbox(jax.jit(model.base.init)(jax.random.key(0), x))
    options = {"parameters": model.parameters} if model.parameters else {}
    quantised = quantize(model.base, params, x, **how, **options)
    variables = model.adapt(quantised, x)
    if trained:
        variables["randlora"] = randomised(variables["randlora"])
    return variables, {**variables, "params": as_floats(variables["params"])}


def as_floats(params):
    return jax.tree.map(floats, params, is_leaf=is_quantised)


def gradients(model, variables, x=X, **options):
    """The loss, and its gradients for the scales and the input."""

    def loss(scales, x, variables):
        y = model.apply({**variables, "randlora": scales}, x, **options)
        return jnp.mean(jnp.sin(y))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(variables["randlora"], x, variables)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.LinearGeneral((4, 32), 64, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        y = jnp.tanh(self.up(x))
        return x + self.down(y.reshape(*y.shape[:-1], 4, 32))


class NnxModel(nnx.Module):
    """Stacked blocks, attention, an Einsum."""

    def __init__(self, rngs):
        make = nnx.vmap(NnxBlock, in_axes=0, out_axes=0)
        self.blocks = nnx.split_rngs(splits=3)(make)(rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, rngs=rngs, decode=False)
        self.heads = nnx.Einsum("abc,cd->abd", (64, 64), (64,), rngs=rngs)

    def __call__(self, x):
        step = lambda x, block: nnx.remat(lambda b, x: b(x))(block, x)
        x = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.heads(x + self.attention(x))


def to_floats(model):
    """An NNX model with floats in place of codes."""
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param):
            variable.set_value(floats(variable.get_value()))
    return model


def equal(a, b):
    """Whether two trees are the same bits."""
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), a, b)))


def kernels(params):
    return {trees.dotted(p): leaf for p, leaf in trees.items(params) if is_quantised(leaf)}
