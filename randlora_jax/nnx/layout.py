"""How an injected NNX model's arrays are divided among devices, told before it compiles."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from randlora_jax import trees
from randlora_jax.layout import layout_of
from randlora_jax.nnx.discovery import modules_of
from randlora_jax.nnx.state import config_of, variables


def set_layout(model: nnx.Module, batch: Any) -> None:
    """Tells an injected model how its arrays are divided on a mesh with automatic axes.

    It computes the same from then on, but needs no callback of the compiler: so it can be exported
    (`jax.export`), serialised, lowered for a mesh that is not there, and found in JAX's persistent
    compilation cache. Arrays that are divided otherwise are moved, and right. `jax.vmap` with a
    `spmd_axis_name` that divides the batch or kernels is refused by JAX then.

    Args:
      model: an injected model on the mesh; an abstract one with shardings will do. What `insert`
        adapts anew is not told of: call it again then.
      batch: one that the model is called on, its first axes those of the tokens: an array, a
        `jax.ShapeDtypeStruct`, or a `NamedSharding`.

    Raises:
      ValueError: if the batch is on no mesh, or a kernel on another.

    Example:
      >>> import jax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from randlora_jax import RandLoraConfig
      >>> from randlora_jax.nnx import inject
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> config = RandLoraConfig(r=2, target_modules="all-linear")
      >>> model = inject(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), config)
      >>> set_layout(model, NamedSharding(mesh, PartitionSpec("data")))
    """
    layout = layout_of(variables(model), config_of(model), batch)
    modules = modules_of(model).items()
    layers: list[tuple[trees.Path, Any]] = [m for m in modules if "randlora_layer" in vars(m[1])]
    for path, module in layers:
        adapted = module.randlora_layer
        labels = {k: k.label for k in adapted.kernels} or {None: ()}  # quantised, not adapted
        told = ((kernel, layout.told((*path, *label))) for kernel, label in labels.items())
        known = tuple((kernel, of_one) for kernel, of_one in told if of_one is not None)
        module.randlora_layer = dataclasses.replace(adapted, told=known)
