"""Which kernels of an NNX model are to be adapted, and how they are stored: without running it."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax import adapters, targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.kernels import SCALES, Kernel
from randlora_jax.layers import rule_for


@dataclasses.dataclass(frozen=True)
class Seen:
    """A kernel to adapt: the module that holds it, and how it is stored."""

    module: nnx.Module
    variable: nnx.Variable
    kernel: Kernel
    stack: tuple[int, ...]

    @property
    def out_sharding(self) -> tuple | None:
        """The names of the kernel's axes, as far as it has any."""
        return self.variable.get_metadata().get("out_sharding")

    def restack(self, core: tuple[int, ...]) -> tuple[int, ...]:
        """A shape for one layer, with the sizes of the kernel's stack."""
        _, sizes = _apart(self.variable.shape, self.stack)
        return _together(core, self.stack, sizes)

    def metadata(self, scale: str) -> dict[str, Any]:
        """Of scales, from their kernel's: gamma has the name of the side that it scales."""
        if self.out_sharding is None:
            return {}
        names, over = list(self.out_sharding), [None] * len(self.stack)
        if len(names) > len(self.kernel.shape):
            names, over = _apart(names, self.stack)
        names = [*names, *[None] * (len(self.kernel.shape) - len(names))]
        wide = self.kernel.in_features <= self.kernel.out_features
        small = self.kernel.input_axes if wide else self.kernel.output_axes
        # Several axes are one in gamma: the first, which is the slowest, can still name it.
        first = None if any(names[i] for i in small[1:]) else names[small[0]]
        core = (None, first if scale == SCALES[1] else None)
        return {"out_sharding": _together(core, self.stack, over)}


def find(modules, config: RandLoraConfig, parameters) -> dict[trees.Path, Seen]:
    """The kernels to adapt by the path of their scales.

    Raises:
      ValueError: naming the module, for targets that match nothing, or nothing that can be adapted.
    """
    known, found = {}, {}
    held = collections.Counter(
        id(v) for m in modules.values() for v in vars(m).values() if isinstance(v, nnx.Variable)
    )
    for path, module in modules.items():
        name, rule = name_of(path), rule_for(module)
        own = {k: v for k, v in vars(module).items() if isinstance(v, nnx.Variable)}
        known[name] = type(module), rule is not None
        if rule is not None and targets.wanted(config, name) is not False:
            if rule.kernel not in own:
                raise ValueError(
                    f"{name!r} has no nnx.Variable {rule.kernel!r}, its class's kernel"
                )
            value = own[rule.kernel].get_value()
            try:
                stack = rule.stack(module, value.shape)
                core = jax.ShapeDtypeStruct(_apart(value.shape, stack)[0], value.dtype)
                kernel = rule.describe(module, core, (), {}, config.fan_in_fan_out)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
            found[path, kernel.label] = Seen(module, own[rule.kernel], kernel, stack)
        for label, variable in own.items():
            target = f"{name}.{label}" if name else label
            for pattern, axes in parameters.items():
                if targets.hits((pattern,), target):
                    value = variable.get_value()
                    kernel = Kernel(tuple(value.shape), tuple(axes), label, value.dtype)
                    found[path, kernel.label] = Seen(module, variable, kernel, ())
                    known[target] = type(module), True
    targets.check(config, known)
    for (path, label), seen in found.items():
        name = name_of(path)
        if held[id(seen.variable)] > 1:
            raise ValueError(
                f"the {seen.kernel.name!r} of {name!r} is that of another module too, which an "
                "update would change: give its name to exclude_modules"
            )
        if adapters.rows(config, (*map(str, path), *label)) and seen.stack not in ((), (0,)):
            raise ValueError(
                f"layers_to_transform={config.layers_to_transform!r} needs stacks on axis 0, but "
                f"{name!r} is stacked on {seen.stack}"
            )
    if config.fan_in_fan_out and all(s.kernel.input_axes != (1,) for s in found.values()):
        warnings.warn(
            "fan_in_fan_out=True has no effect here: no target stores its kernel (out, in)",
            stacklevel=3,
        )
    return {(*map(str, path), *label): seen for (path, label), seen in found.items()}


def shapes(found: dict[trees.Path, Seen], r: int) -> dict[str, Any]:
    """The scales' shapes as the model stores them."""
    leaves = {}
    for path, seen in found.items():
        dtype = jnp.promote_types(seen.kernel.dtype, jnp.float32)
        for scale, shape in zip(SCALES, seen.kernel.scale_shapes(r), strict=True):
            leaves[(*path, scale)] = jax.ShapeDtypeStruct(seen.restack(shape), dtype)
    return trees.build(leaves)


def name_of(path) -> str:
    """A module's path in NNX as PEFT writes it: "layers.0.attn"."""
    return targets.name_of(map(str, path))


def _apart(shape, stack) -> tuple[tuple, tuple]:
    """What a shape has for one layer, and for the stack's axes."""
    core, over = list(shape), []
    for axis in stack:
        over.append(core.pop(axis))
    return tuple(core), tuple(over)


def _together(core, stack, over) -> tuple:
    """The inverse of `_apart`."""
    shape = list(core)
    for axis, value in reversed(list(zip(stack, over, strict=True))):
        shape.insert(axis if axis >= 0 else len(shape), value)
    return tuple(shape)
