"""How a model's arrays are divided among devices, told before it compiles.

On a mesh with automatic axes the compiler decides, and tells it in a callback while it compiles. A
program with callbacks can't be exported, serialised or found in a compilation cache again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
from jax.core import Tracer
from jax.sharding import NamedSharding

from randlora_jax import trees
from randlora_jax.adapters import named
from randlora_jax.checks import check_variables
from randlora_jax.ops.division import Told
from randlora_jax.placement import mesh_axes
from randlora_jax.quantised import codes, is_quantised
from randlora_jax.sharding import padded, sites_by_name, spec_in, spec_of
from randlora_jax.sites import Stack


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is told of each adapted kernel, as one layer has it, by the path of its scales."""

    layers: tuple[tuple[trees.Path, Told], ...]

    def told(self, path: trees.Path) -> Told | None:
        """What is told of the layer whose scales are at the path."""
        return self._by_path.get(path)

    @functools.cached_property
    def _by_path(self) -> dict[trees.Path, Told]:
        return dict(self.layers)


def layout_of(variables: trees.Tree, config: named.Configs, batch: Any) -> Layout:
    """The layout of a batch and of adapted kernels, as they are placed.

    Args:
      variables: with "randlora", which tells of the kernels.
      batch: an array, a `jax.ShapeDtypeStruct` with a sharding, or a `NamedSharding`.

    Raises:
      ValueError: if the batch is on no mesh, or a kernel on another.
    """
    check_variables(variables, "params", "randlora", "randlora_bases")
    placed = batch if isinstance(batch, NamedSharding) else getattr(batch, "sharding", None)
    if not isinstance(placed, NamedSharding):
        raise ValueError(
            f"batch is on no mesh, but {_where(batch)}: outside of jax.jit, give one as the model "
            "gets it, or its sharding, NamedSharding(mesh, PartitionSpec('data'))"
        )
    mesh, tokens = placed.mesh, tuple(map(mesh_axes, placed.spec))
    bases = mesh_axes(spec_of(variables["randlora_bases"]["randlora_B"])[0])
    layers = {}
    params = dict(trees.items(variables["params"]))
    sites = {site.path: site for _, site in sites_by_name(variables, config)}
    # A quantised kernel without an update is multiplied by ours too; how it is stacked, nobody
    # says, but its own axes are the last, mostly.
    alone = {path[:-1]: path for path, leaf in params.items() if is_quantised(leaf)}
    kernels = alone | {path: site.kernel_path for path, site in sites.items()}
    for path, kernel_path in kernels.items():
        box = codes(params[kernel_path])
        array, name = trees.unboxed(box), trees.dotted(kernel_path)
        own = getattr(array, "sharding", None)
        if own is None and not isinstance(box, nn.Partitioned):
            raise ValueError(
                f"{name!r} has no sharding, but is {_where(array)}: give variables that are on the "
                "mesh, or jax.ShapeDtypeStructs with the shardings of rl.sharding"
            )
        if isinstance(own, NamedSharding) and own.mesh.shape != mesh.shape:
            raise ValueError(
                f"{name!r} is on another mesh than the batch, {own.mesh} and not {placed.mesh}: "
                "put both on one"
            )
        entries = padded(spec_in(kernel_path, box, mesh, None), array.ndim)
        stack = sites[path].stack if path in sites else Stack()
        layer, of_layers = stack.split(entries)
        of_stack = tuple(axis for entry in of_layers for axis in mesh_axes(entry))
        kernel = tuple(map(mesh_axes, layer))
        layers[path] = Told(mesh, tokens, kernel, bases, stack=of_stack)
    return Layout(tuple(layers.items()))


def _where(array: Any) -> str:
    kinds = {Tracer: "traced", jax.ShapeDtypeStruct: "abstract"}
    found = (name for kind, name in kinds.items() if isinstance(array, kind))
    return next(found, str(getattr(array, "sharding", repr(array))))
