"""Which layers of stacks a config means."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from randlora_jax import targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.sites import Shape, Site, Stack
from randlora_jax.targets import Selection


def part_of_stack(config: RandLoraConfig, module: trees.Path, stored: Shape) -> Stack:
    """The stack, if the scales of a kernel of that shape have rows for some of its layers alone."""
    if targets.selection(config, trees.dotted(module)) is not Selection.BY_LAYER:
        return Stack()
    return Stack((0,), tuple(stored[:1]), targets.layer_indices(config))


def select_layers(sites: Iterable[Site], config: RandLoraConfig) -> list[Site]:
    """The sites of live models, less the layers of stacks that `layers_to_transform` leaves out.

    Raises:
      ValueError: for layers that a stack has not, and if nothing is left.
    """
    kept = []
    for site in sites:
        name = trees.dotted(site.module)
        if targets.selection(config, name) is not Selection.BY_LAYER:
            kept.append(site)
        elif site.stack.axes:  # else in no stack, and without a number: in no layer, as PEFT has it
            layers, stack = targets.layer_indices(config), site.stack
            if stack.axes[0] != 0:
                raise ValueError(
                    f"layers_to_transform={config.layers_to_transform!r} counts layers along the "
                    f"first axis, and {name!r} is stacked along another: set it to None, or "
                    "stack the layers along axis 0 (in Linen, variable_axes={'params': 0})"
                )
            if len(stack.axes) > 1 or layers[-1] >= stack.sizes[0]:
                raise ValueError(
                    f"layers_to_transform={config.layers_to_transform!r} does not fit the stack "
                    f"{name!r} of {stack.sizes} layers"
                )
            kept.append(dataclasses.replace(site, stack=dataclasses.replace(stack, layers=layers)))
    if not kept:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} with layers_pattern="
            f"{config.layers_pattern!r} leaves no layer: no path has a layer number or a stack"
        )
    return kept
