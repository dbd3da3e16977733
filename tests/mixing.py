"""Models with a table of adapters, and what each row of a batch must be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import randlora_jax as rl
from randlora_jax.linen import RandLora
from tests.linen_cases import normal, quick_jit

R, D = 5, 12
CONFIG = rl.RandLoraConfig(r=R, randlora_alpha=2.0, target_modules="all-linear")
CONFIGS = {
    "chat": CONFIG,
    "code": CONFIG.replace(randlora_alpha=0.7, target_modules=["up", "query"]),
    "math": CONFIG.replace(randlora_alpha=-3.0),
}
NAMES = ["code", "__base__", "math", "chat", "code"]  # of rows


class Block(nn.Module):
    """Attention and a gated network: dense layers, general ones, and an einsum."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(2, name="attn")(nn.tanh(x), x)
        hidden = nn.tanh(nn.Dense(17, name="up")(x)) * nn.Dense(17, name="gate")(x)
        down = nn.Einsum((17, D), "...h,hd->...d", name="down")(hidden)
        return nn.tanh(x + down), None


class Plain(nn.Module):
    """One block."""

    @nn.compact
    def __call__(self, x):
        return Block(name="block")(x)[0]


class Scanned(nn.Module):
    """Blocks in a scan, rematerialised."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return layers(name="layers")(x, None)[0]


def small(scales, seed):
    """Scales of a trained adapter's size, away from their start."""
    rng = np.random.default_rng(seed)
    draw = lambda a: jnp.asarray(0.15 * rng.standard_normal(a.shape), a.dtype)
    return jax.tree.map(draw, scales)


def named(base, x, configs=CONFIGS):
    """(model of adapters by name, its variables), trained apart."""
    model = RandLora(base, configs)
    variables = quick_jit(model.init)(jax.random.key(0), x)
    scales = {n: small(variables["randlora"][n], i) for i, n in enumerate(configs)}
    return model, {**variables, "randlora": scales}


def alone(model, name):
    """The function of variables and x that has one adapter, or none."""
    return quick_jit(model.clone(active=() if name == "__base__" else (name,)).apply)


def expected(model, variables, x, names=NAMES):
    """What rows of x are, each of its adapter: of each adapter alone."""
    whole = {name: alone(model, name)(variables, x) for name in dict.fromkeys(names)}
    return jnp.stack([whole[name][row] for row, name in enumerate(names)])


def tokens(rows=5, length=3):
    return normal(3, rows, length, D)
