"""Small NNX models, and how an injected one is checked against its base in float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from randlora_jax import RandLoraConfig, register_layer, trees
from randlora_jax.nnx import inject, update, variables
from tests.linen_cases import as_numpy, assert_close, normal, plus_update, randomised

__all__ = ["assert_close", "randomised"]
R, D = 3, 6
CONFIG = RandLoraConfig(r=R, randlora_alpha=2.0, target_modules="all-linear")


class OwnEinsum(nnx.Module):
    """As gemma and tunix write it: a parameter `w`, and no door to its product."""

    def __init__(self, einsum_str, shape, *, rngs):
        self.einsum_str = einsum_str
        self.w = nnx.Param(nnx.initializers.normal()(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class PlainEinsum(OwnEinsum):
    """The same, registered as a plain product."""


register_layer(OwnEinsum, kernel="w")
register_layer(PlainEinsum, kernel="w", plain=True)


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.up = nnx.Linear(D, 8, rngs=rngs)
        self.down = nnx.Linear(8, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class MLP(nnx.Module):
    """A list of blocks, and a method besides the call."""

    def __init__(self, layers=2, *, rngs):
        self.layers = nnx.List([Block(rngs=rngs) for _ in range(layers)])
        self.head = nnx.Linear(D, 4, rngs=rngs)

    def features(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def __call__(self, x):
        return self.head(self.features(x))


class Stack(nnx.Module):
    """Blocks made by `nnx.vmap` and run by `nnx.scan` over `nnx.remat`."""

    def __init__(self, layers=3, axis=0, *, rngs):
        # Tree mode has no axes that differ by state.
        self.axes = nnx.StateAxes({nnx.Param: axis, ...: 0}) if axis else 0

        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=self.axes)
        def make(rngs):
            return Block(rngs=rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(D, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, self.axes), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return self.head(run(x, self.blocks))


def trained(model, config=CONFIG, seed=7, **options):
    """The model, injected, with random scales."""
    return with_random_scales(inject(model, config, **options), seed)


def with_random_scales(model, seed=7):
    """The same of a model that is injected already."""
    values = variables(model)
    update(model, {**values, "randlora": randomised(values["randlora"], seed)})
    return model


def in_float64(make, model, kernels, method, *args, config=CONFIG):
    """What the base computes with W + dW, and what it is worth: all of it in float64.

    Args:
      make: makes the base.
      kernels: as in `linen_cases`: input axes and stack axes of each adapted kernel by path.
      method: a function of (base, *args).
    """
    values = as_numpy(variables(model))
    bases = [values["randlora_bases"][k] for k in ("randlora_A", "randlora_B")]
    graphdef, state = nnx.split(make())
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(jnp.asarray, values)
        params = plus_update(
            wide["params"], wide["randlora"], [jnp.asarray(b) for b in bases], kernels,
            config.scaling,
        )  # fmt: skip
        flat = dict(trees.items(params))
        base = nnx.merge(graphdef, state)
        for path, variable in nnx.iter_graph(base):
            if isinstance(variable, nnx.Param):
                variable.set_value(flat[tuple(map(str, path))])
        return np.asarray(method(base, *(jnp.asarray(np.asarray(a, np.float64)) for a in args)))


def x(seed=0, *shape):
    return normal(seed, *(shape or (5, D)))


@contextlib.contextmanager
def unchanged_if_it_fails(model):
    """What raises in here has left an NNX model as it was: structure, classes, objects, arrays."""

    structure = lambda: (nnx.graphdef(model), [path for path, _ in nnx.iter_graph(model)])
    objects = lambda: [
        *(node for _, node in nnx.iter_graph(model)),
        *jax.tree.leaves(nnx.state(model)),
    ]
    before, kept, done = structure(), objects(), False
    try:
        yield
        done = True
    finally:
        same = lambda: all(a is b for a, b in zip(kept, objects(), strict=True))
        assert done or (structure() == before and same())
