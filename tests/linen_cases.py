"""How an adapted model is checked: against itself unwrapped, and against W + dW in float64."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax import RandLoraConfig, trees
from randlora_jax.linen import RandLora
from tests.linen_models import ScanLayer

R = 3

# Compiled without optimisation: these functions run once.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def normal(seed: int, *shape: int) -> jax.Array:
    """Random float32 numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def randomised(scales: trees.Tree, seed: int = 7) -> dict[str, Any]:
    """Scales of the same shapes and boxes as these, away from zero and from their start."""
    rng = np.random.default_rng(seed)

    def draw(_, leaf):
        old = nn.unbox(leaf)
        size = rng.uniform(0.2, 0.8, old.shape) * rng.choice([-1, 1], old.shape)
        return nn.meta.replace_boxed(leaf, jnp.asarray(size, old.dtype))

    return trees.map_with_path(draw, scales)


def update(A, B, lam, gamma, in_features, out_features, scaling):
    """The update of one kernel, (in, out): the sum over j of B[j // r, j % r] (x) U[j]."""
    r, n = lam.shape
    small, large = sorted((in_features, out_features))
    j = np.arange(r * n)
    V = B[:large, j // r, j % r]  # (large, r * n)
    U = lam[j // n, j % n][:, None] * A[j // n, 0, :small] * gamma[j % n]
    M = V @ U
    return scaling * (M.T if in_features <= out_features else M)


def stacked_update(shape, stack, inputs, stacked, bases, lam, gamma, scaling):
    """The update of a stack, each layer by itself: `stack` names its axes, outermost first."""
    if stack:
        axis, *rest = stack
        inner = [n for i, n in enumerate(shape) if i != axis % len(shape)]
        one = lambda lam, gamma: stacked_update(
            inner, rest, inputs, stacked, bases, lam, gamma, scaling
        )
        return jax.vmap(one, axis, axis)(lam, gamma)
    outputs = [i for i in range(len(shape)) if i not in (*inputs, *stacked)]
    sides = (math.prod(shape[i] for i in axes) for axes in (inputs, outputs))
    one = functools.partial(update, *bases)
    for _ in stacked:  # the scales of each expert are in front
        one = jax.vmap(one, (0, 0, None, None, None))
    delta, order = one(lam, gamma, *sides, scaling), [*stacked, *inputs, *outputs]
    return jnp.transpose(delta.reshape([shape[i] for i in order]), np.argsort(order))


def plus_update(params, scales, bases, kernels, scaling):
    """The parameters with each kernel of `kernels` as W + dW, computed in their own dtype."""
    params, scales = dict(trees.items(params)), dict(trees.items(scales))
    for name, (inputs, stack, *others) in kernels.items():
        path, stacked = tuple(name.split("/")), others[0] if others else ()
        plain = path[-1] == "kernel" and inputs == tuple(range(len(inputs))) and not stacked
        listed = ";".join(",".join(map(str, axes)) for axes in (stacked, inputs) if axes)
        label = () if plain else (f"{path[-1]}[{listed}]",)
        pair = (scales[(*path[:-1], *label, f"randlora_{s}")] for s in ("lambda", "gamma"))
        W = params[path]
        params[path] = W + stacked_update(W.shape, stack, inputs, stacked, bases, *pair, scaling)
    return trees.build(params)


def as_numpy(tree, dtype=np.float64):
    return jax.tree.map(lambda x: np.asarray(x, dtype), nn.unbox(tree))


@dataclasses.dataclass(eq=False)
class Case:
    """A base model and what is known of its kernels.

    Attributes:
      kernels: for each adapted kernel, its input axes within one layer, and its stack's axes; and
        the axes within one layer along which it is a stack itself, if it is one.
      before, after: the base's arguments around the arrays, which are no arrays themselves.
      exact: the base as float64 can run it, where `base` fixes a dtype of its own.
    """

    base: nn.Module
    arrays: tuple[jax.Array, ...]
    kernels: Mapping[str, tuple[tuple[int, ...], ...]]
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()
    exact: nn.Module | None = None
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tolerance: float = 2e-5

    @property
    def args(self):
        return (*self.before, *self.arrays, *self.after)

    @functools.cached_property
    def model(self) -> RandLora:
        settings = {"r": R, "randlora_alpha": 2.0, "target_modules": "all-linear", **self.config}
        return RandLora(self.base, RandLoraConfig(**settings), parameters=self.parameters)

    @functools.cached_property
    def initial(self):
        """Variables of the base and of the adapted model, from one key; the latter lack bases."""

        def init(arrays):
            args = (jax.random.key(1), *self.before, *arrays, *self.after)
            return self.base.init(*args), {**self.model.init(*args), "randlora_bases": {}}

        return quick_jit(init)(self.arrays)

    @property
    def base_variables(self):
        return self.initial[0]

    @functools.cached_property
    def adapted(self):
        return self.model.adapt(self.base_variables, *self.args)

    @functools.cached_property
    def variables(self):
        # The bases that `adapt` drew: eagerly, so that cases of one size compile them once.
        return {**self.initial[1], "randlora_bases": self.adapted["randlora_bases"]}

    @functools.cached_property
    def trained(self):
        return {**self.variables, "randlora": randomised(self.variables["randlora"])}

    @functools.cached_property
    def actual(self):
        """The output and the gradients to the scales, the base and the inputs."""
        rest = {k: v for k, v in self.trained.items() if k not in ("randlora", "params")}

        def apply(scales, params, arrays):
            variables = {**rest, "randlora": scales, "params": params}
            return self.model.apply(variables, *self.before, *arrays, *self.after)

        trained = self.trained["randlora"], self.trained["params"]
        return output_and_gradients(apply, *trained, self.arrays)

    @functools.cached_property
    def expected(self):
        """The same from the unwrapped model on W + dW in float64."""
        base, variables = self.exact or self.base, as_numpy(self.trained)
        rest = {k: v for k, v in variables.items() if "randlora" not in k and k != "params"}
        bases = [variables["randlora_bases"][k] for k in ("randlora_A", "randlora_B")]
        scaling = self.model.config.scaling

        def apply(scales, params, arrays):
            params = plus_update(params, scales, bases, self.kernels, scaling)
            return base.apply({**rest, "params": params}, *self.before, *arrays, *self.after)

        with jax.enable_x64(True):
            trained = variables["randlora"], variables["params"]
            return output_and_gradients(apply, *trained, as_numpy(self.arrays))


def output_and_gradients(apply, scales, params, arrays):
    """apply(scales, params, arrays), and the gradients of its sum with random weights."""

    def both(*given):
        y, vjp = jax.vjp(apply, *given)
        rng = np.random.default_rng(3)
        probe = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), y)
        return y, vjp(probe)

    return as_numpy(quick_jit(both)(scales, params, arrays))


def assert_same_bits(actual, expected):
    """The same tree, with the same shapes, dtypes and values."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for path, leaf in jax.tree.leaves_with_path(expected):
        other = dict(jax.tree.leaves_with_path(actual))[path]
        assert (other.shape, other.dtype) == (leaf.shape, leaf.dtype), path
        assert bool((other == leaf).all()), path


def assert_close(actual, expected, tolerance):
    """Each leaf within the tolerance of its largest number, or of a hundredth of the tree's."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    other = dict(jax.tree.leaves_with_path(actual))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for path, leaf in jax.tree.leaves_with_path(expected):
        assert other[path].shape == leaf.shape, path
        error = np.abs(other[path] - leaf).max()
        assert error <= tolerance * max(np.abs(leaf).max(), largest / 100), (path, error)


# What holds for every case: the modules that import these tests have the fixture `case`.


def test_the_base_has_the_paths_and_initial_values_of_the_unwrapped_model(case):
    assert_same_bits(case.variables["params"], case.base_variables["params"])


def test_output_is_bit_identical_before_training(case):
    y = case.model.apply(case.variables, *case.args)
    expected = case.base.apply(case.base_variables, *case.args)
    if isinstance(case.base, ScanLayer):
        assert_close(y, expected, 1e-6)
    else:
        assert_same_bits(y, expected)


def test_output_is_that_of_kernel_plus_update(case):
    assert_close(case.actual[0], case.expected[0], case.tolerance)


def test_gradients_are_those_of_kernel_plus_update(case):
    assert_close(case.actual[1], case.expected[1], case.tolerance)
