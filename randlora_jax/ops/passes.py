"""A call's forward and backward pass, from what it has of codes, dropout, rows and updates."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from randlora_jax.ops.partitioning import Arrays
from randlora_jax.ops.products import Backward, Forward, Frozen, Pass
from randlora_jax.ops.quantised import Dequantised
from randlora_jax.ops.spec import Spec

Kind = type[Forward] | type[Backward]


def pass_of(kind: Kind, spec: Spec) -> Callable[..., Arrays]:
    """The pass of a kind, a function of operands by name."""
    run = _of_floats(kind, spec)
    return Dequantised(run, spec.grid) if spec.grid else run


def _of_floats(kind: Kind, spec: Spec) -> Callable[..., Arrays]:
    if not spec.updated:
        return Frozen(spec)
    if spec.rates:
        return Dropped(spec, kind)
    return EachRow(spec, kind) if spec.rows else kind(spec)


@dataclasses.dataclass(frozen=True)
class Beside(Pass):
    """A pass in which the kernel is multiplied apart from the updates."""

    of: Kind

    def frozen(self, x: Array, kernel: Array | None, dy: Array | None) -> Arrays:
        """The kernel's part of the results, if there is a kernel."""
        return {} if kernel is None else Frozen(self.spec)(x=x, kernel=kernel, dy=dy)


class EachRow(Beside):
    """A pass in which each row of tokens has scales of its own: that of one row, mapped."""

    def __call__(
        self, x: Array, A: Array, V: Array, kernel: Array | None = None, **others: Array
    ) -> Arrays:
        """The results, of operands by name."""
        spec = self.spec
        strategy = "unmerged" if spec.strategy == "auto" else spec.strategy
        row = dataclasses.replace(
            spec,
            plus_kernel=False,
            strategy=strategy,
            rows=0,
            token_axes=spec.token_axes - spec.rows,
        )
        run = lambda named: self.of(row)(A=A, V=V, **named)
        for _ in range(spec.rows):
            run = jax.vmap(run)
        found = run({"x": x, **others})
        for name, value in self.frozen(x, kernel, others.get("dy")).items():
            found[name] = value + found[name]
        return found


class Dropped(Beside):
    """A pass in which each adapter's input is what its dropout keeps of x; the kernel's is x."""

    def __call__(
        self,
        x: Array,
        keep: Array,
        lam: Array,
        gamma: Array,
        kernel: Array | None = None,
        **others: Array,
    ) -> Arrays:
        """The results, of operands by name."""
        spec = self.spec
        alone = _of_floats(self.of, dataclasses.replace(spec, plus_kernel=False, rates=()))
        frozen = self.frozen(x, kernel, others.get("dy"))
        found = {name: [value] for name, value in frozen.items()}
        for i, rate in enumerate(spec.rates):
            left = functools.partial(_kept, keep=keep[i], rate=rate)
            mine = lambda scales, i=i: jax.lax.slice_in_dim(scales, i, i + 1, axis=spec.rows)
            part = alone(x=left(x), lam=mine(lam), gamma=mine(gamma), **others)
            for name, value in part.items():
                found.setdefault(name, []).append(left(value) if name == "dx" else value)
        scales = ("d_lam", "d_gamma")
        return {
            name: jnp.concatenate(each, spec.rows)
            if name in scales
            else functools.reduce(jnp.add, each)
            for name, each in found.items()
        }


def _kept(x: Array, keep: Array, rate: float) -> Array:
    """What the dropout of one adapter leaves of x, or of its gradient."""
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x)) if rate < 1 else x * keep
