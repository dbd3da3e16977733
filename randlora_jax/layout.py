"""How a model's arrays are divided among devices, told before it compiles.

On a mesh with automatic axes the compiler decides, and tells it in a callback while it compiles. A
program with callbacks can't be exported, serialised or found in a compilation cache again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding

from randlora_jax import trees
from randlora_jax.adapters import named
from randlora_jax.checks import check_variables
from randlora_jax.ops.division import Axes, Told, mesh_axes
from randlora_jax.stored import sites_by_name


@dataclasses.dataclass(frozen=True)
class Layout:
    """The axes of a mesh that divide a batch and the kernels.

    Attributes:
      tokens: for each axis of the batch.
      kernels: for each axis of a kernel, as one layer has it, by the path of its scales.
    """

    mesh: Mesh | AbstractMesh
    tokens: tuple[Axes, ...]
    kernels: tuple[tuple[trees.Path, tuple[Axes, ...]], ...]

    def told(self, path: trees.Path) -> Told | None:
        """What is told of the layer whose scales are at the path."""
        axes = dict(self.kernels).get(path)
        return None if axes is None else Told(self.mesh, self.tokens, axes)


def layout_of(variables: trees.Tree, config: named.Configs, batch: Any) -> Layout:
    """The layout of a batch and of adapted kernels, as they are placed.

    Args:
      variables: with "randlora", which tells of the kernels.
      batch: an array, a `jax.ShapeDtypeStruct` with a sharding, or a `NamedSharding`.

    Raises:
      ValueError: if the batch is on no mesh, or a kernel on another.
    """
    placed = batch if isinstance(batch, NamedSharding) else getattr(batch, "sharding", None)
    if not isinstance(placed, NamedSharding):
        raise ValueError(
            f"batch is on no mesh, but {placed}: give one as the model gets it, or its sharding, "
            "NamedSharding(mesh, PartitionSpec('data'))"
        )
    check_variables(variables, "params", "randlora", "randlora_bases")
    kernels = {}
    for _, site in sites_by_name(variables, config):
        array = trees.unboxed(trees.get(variables["params"], site.kernel_path))
        own = getattr(array, "sharding", None)
        if isinstance(own, NamedSharding) and own.mesh != placed.mesh:
            raise ValueError(
                f"{trees.dotted(site.kernel_path)!r} is on another mesh than the batch, "
                f"{own.mesh} and not {placed.mesh}: put both on one"
            )
        spec = tuple(own.spec) if isinstance(own, NamedSharding) else ()
        layer, _ = site.stack.split((*spec, *[None] * (array.ndim - len(spec))))
        kernels[site.path] = tuple(map(mesh_axes, layer))
    return Layout(placed.mesh, tuple(map(mesh_axes, placed.spec)), tuple(kernels.items()))
