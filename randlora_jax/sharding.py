"""Where adapted variables live on a mesh: next to the kernels they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax import trees
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.stored import sites_of


def sharding(
    variables: trees.Tree,
    config: RandLoraConfig,
    mesh: Mesh | None = None,
    *,
    data_axes: Sequence[str] = (),
) -> dict[str, Any]:
    """Shardings for `jax.device_put`, or for in_shardings and out_shardings of `jax.jit`.

    The base's are what they are: of arrays, or as their boxes' names say. A gamma is divided like
    the side of the kernel that it scales; lambda and the bases are small and are used by every
    device, so each has them whole.

    Args:
      variables: as `adapt` returned them; `jax.ShapeDtypeStruct`s with shardings will do.
      config: the adapter's.
      mesh: where no array tells.
      data_axes: mesh axes that divide the batch. Scales are not divided along them: there each
        device needs all of a gamma, and would have to fetch it.

    Returns:
      A tree of `NamedSharding` like `variables`, boxes replaced by their one leaf.

    Raises:
      ValueError: if there is no mesh to be found, or if it has no axis of a name in `data_axes`.

    Example:
      >>> import jax
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> kernel = jax.ShapeDtypeStruct((4, 8), "float32",
      ...                               sharding=NamedSharding(mesh, P("model", None)))
      >>> scales = {s: jax.ShapeDtypeStruct(n, "float32")
      ...           for s, n in (("randlora_lambda", (2, 2)), ("randlora_gamma", (2, 4)))}
      >>> bases = {"randlora_A": jax.ShapeDtypeStruct((2, 1, 4), "float32"),
      ...          "randlora_B": jax.ShapeDtypeStruct((8, 2, 2), "float32")}
      >>> variables = {"params": {"kernel": kernel}, "randlora": scales, "randlora_bases": bases}
      >>> sharding(variables, RandLoraConfig(r=2))["randlora"]["randlora_gamma"].spec
      P(None, 'model')
    """
    check_variables(variables, "params", "randlora", "randlora_bases")
    check_config(config)
    leaves = {path: nn.unbox(leaf) for path, leaf in trees.items(variables)}
    found = (getattr(leaf, "sharding", None) for leaf in leaves.values())
    meshes = [s.mesh for s in found if isinstance(s, NamedSharding)]
    on = mesh or (meshes[0] if meshes else None)
    if on is None:
        raise ValueError("mesh is None, and no array is on one: give the mesh")
    if isinstance(data_axes, str):
        raise TypeError(f"data_axes must be a list of names, got {data_axes!r}")
    for axis in data_axes:
        if axis not in on.axis_names:
            raise ValueError(
                f"data_axes: {axis!r} is no axis of the mesh, which has {on.axis_names}"
            )
    specs = {path: _spec(leaf) for path, leaf in trees.items(variables)}
    for site in sites_of(variables, config, guess=True):
        kernel = ("params", *site.kernel_path)
        names = [*specs[kernel], *[None] * (leaves[kernel].ndim - len(specs[kernel]))]
        layer, stack = site.stack.split(names)
        named = [None if set(data_axes) & set(_mesh_axes(entry)) else entry for entry in layer]
        for scale, axes in site.scale_axes(site.stack.join(named, stack)).items():
            specs[("randlora", *site.path, scale)] = P(*axes)
    return trees.map_with_path(lambda path, _: NamedSharding(on, specs[path]), variables)


def _spec(leaf: Any) -> P:
    """The PartitionSpec of a leaf: of its box, of its array, or none."""
    if isinstance(leaf, nn.Partitioned):
        return leaf.get_partition_spec()
    kind = getattr(leaf, "sharding", None)
    return kind.spec if isinstance(kind, NamedSharding) else P()


def _mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh's axes in one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
