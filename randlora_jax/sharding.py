"""Where adapted variables live on a mesh: next to the kernels they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.linen.spmd import logical_to_mesh_axes
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from randlora_jax import trees
from randlora_jax.adapters import named
from randlora_jax.checks import check_config, check_variables
from randlora_jax.placement import fitting, mesh_axes
from randlora_jax.quantised import codes, is_quantised
from randlora_jax.sites import GAMMA, Site
from randlora_jax.stored import of_one_slot, sites_of, slots_of

Rules = Sequence[tuple[str, Any]]


def sharding(
    variables: trees.Tree,
    config: named.Configs,
    mesh: Mesh | AbstractMesh | None = None,
    *,
    data_axes: Sequence[str] | None = None,
    zero_axes: Sequence[str] = (),
    bases_axes: Sequence[str] = (),
    table_axes: Sequence[str] = (),
    rules: Rules | None = None,
) -> dict[str, Any]:
    """Shardings for `jax.device_put`, or for in_shardings and out_shardings of `jax.jit`.

    The base's are what they are: of arrays, or as their boxes' names say. What the adapter adds is
    small and is used by every device, so each has it whole, but for the axis of a stack.

    Args:
      variables: as `adapt` returned them; `jax.ShapeDtypeStruct`s with shardings will do.
      config: the adapter's, or those of several by name.
      mesh: where no array tells.
      data_axes: mesh axes that divide the batch. With them given, a gamma is divided along all
        others like the side of the kernel that it scales, which costs nothing to exchange.
      zero_axes: mesh axes that divide gammas wherever their sizes allow, and so their gradients
        and the optimizer's state, as ZeRO does it: each use of a gamma has to fetch it.
      bases_axes: mesh axes that divide `randlora_B`: those that divide kernels. Layers whose large
        side is not divided by them fetch the rows that they read, each time. Rows that they don't
        divide evenly stay whole.
      table_axes: mesh axes that divide the slots of a table of adapters: each call then fetches the
        entries of its rows.
      rules: what the names in boxes are on the mesh, as in Flax's `nn.logical_axis_rules`; by
        default the boxes' own, or those of the context.

    Returns:
      A tree of `NamedSharding` like `variables`, boxes replaced by their one leaf, but for those
      of quantised kernels, which stay with one for codes and one for scales.

    Raises:
      ValueError: if there is no mesh to be found, or if it has no axis of a name that is given.

    Example:
      >>> from randlora_jax import RandLoraConfig
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> kernel = jax.ShapeDtypeStruct((4, 8), "float32",
      ...                               sharding=NamedSharding(mesh, P("model", None)))
      >>> scales = {s: jax.ShapeDtypeStruct(n, "float32")
      ...           for s, n in (("randlora_lambda", (2, 2)), ("randlora_gamma", (2, 4)))}
      >>> bases = {"randlora_A": jax.ShapeDtypeStruct((2, 1, 4), "float32"),
      ...          "randlora_B": jax.ShapeDtypeStruct((8, 2, 2), "float32")}
      >>> variables = {"params": {"kernel": kernel}, "randlora": scales, "randlora_bases": bases}
      >>> config = RandLoraConfig(r=2)
      >>> sharding(variables, config)["randlora"]["randlora_gamma"].spec
      P(None, None)
      >>> sharding(variables, config, data_axes=[])["randlora"]["randlora_gamma"].spec
      P(None, 'model')
    """
    check_variables(variables, "params", "randlora", "randlora_bases")
    check_config(config, several=True)
    named.check(config)
    on = mesh or mesh_of(variables)
    if on is None:
        raise ValueError("mesh is None, and no array is on one: give the mesh")
    fields = {"data_axes": data_axes, "zero_axes": zero_axes, "bases_axes": bases_axes}
    fields["table_axes"] = table_axes
    for field, axes in fields.items():
        _check_axes(field, axes or (), on)
    shapes = {path: trees.array_of(leaf).shape for path, leaf in trees.items(variables)}
    specs = {path: spec_in(path, leaf, on, rules) for path, leaf in trees.items(variables)}
    B = ("randlora_bases", "randlora_B")
    specs[B] = P(*fitting([tuple(bases_axes)], shapes[B][:1], on)) if bases_axes else P()
    slots = (tuple(table_axes) or None,) if slots_of(variables) else ()
    for name, site in sites_by_name(variables, config):
        kernel = ("params", *site.kernel_path)
        names = padded(specs[kernel], len(shapes[kernel]))
        for scale, axes in site.scale_axes(names, followed(data_axes), slots).items():
            path = ("randlora", *([name] if name else []), *site.path, scale)
            more, shape = zero_axes if scale == GAMMA else (), shapes[path]
            specs[path] = P(*_divided_more(fitting(axes, shape, on), shape, more, on))
    return trees.map_with_path(lambda path, leaf: placed(leaf, specs[path], on), variables)


def placed(leaf: Any, spec: P, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of a leaf; of a quantised one a leaf of them, tiles divided like the codes."""
    if not is_quantised(leaf):
        return NamedSharding(mesh, spec)
    fits = lambda shape: P(*fitting(padded(spec, len(shape)), shape, mesh))
    return jax.tree.map(lambda array: NamedSharding(mesh, fits(array.shape)), leaf)


def sites_by_name(variables: trees.Tree, config: named.Configs) -> Iterator[tuple[str, Site]]:
    """(name of the adapter, site) of each site, as far as shapes tell; "" for one config alone."""
    for name, one in named.by_name(config).items():
        of_one = {**variables, "randlora": named.scales_of(variables, name)}
        of_one = of_one_slot(of_one, one) if slots_of(variables) else of_one
        for site in sites_of(of_one, one, guess=True):
            yield name, site


def followed(
    data_axes: Sequence[str] | None, resolve: Callable[[Any], Any] = lambda name: name
) -> Callable[[Any], bool]:
    """Whether a gamma is divided where the side of the kernel that it scales has this name.

    Args:
      resolve: gives what the name is on the mesh.
    """
    return lambda name: data_axes is not None and not set(data_axes) & set(mesh_axes(resolve(name)))


def mesh_of(variables: trees.Tree) -> Mesh | AbstractMesh | None:
    """The mesh that variables are on, if an array among them is on one."""
    found = (getattr(trees.array_of(leaf), "sharding", None) for _, leaf in trees.items(variables))
    return next((s.mesh for s in found if isinstance(s, NamedSharding)), None)


def whole_beside(params: trees.Tree, added: Any) -> Any:
    """What is added to a base, whole on each device of the mesh that the base is on, if on one."""
    mesh = mesh_of(params)
    traced = any(isinstance(trees.array_of(leaf), Tracer) for _, leaf in trees.items(params))
    if traced or mesh is None:
        return added
    where = NamedSharding(mesh, P())

    def put(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        stays = mesh_of({"": leaf}) == mesh or isinstance(leaf, Tracer)
        return leaf if stays or isinstance(mesh, AbstractMesh) else jax.device_put(leaf, where)

    return jax.tree.map(put, added)


def along(kernel: Any, axes: Sequence[Any], scale: Any) -> Any:
    """A scale, divided along these axes of the mesh that its kernel is on, if any is named."""
    mesh = mesh_of({"": kernel})
    concrete = isinstance(scale, jax.Array) and not isinstance(scale, Tracer)
    if not isinstance(mesh, Mesh) or not any(axes) or not concrete:
        return scale
    return jax.device_put(scale, NamedSharding(mesh, P(*fitting(axes, scale.shape, mesh))))


def spec_of(array: Any) -> tuple[Any, ...]:
    """What each of an array's axes is divided by, if it is on a mesh."""
    array = codes(array)
    kind = getattr(array, "sharding", None)
    return padded(kind.spec if isinstance(kind, NamedSharding) else P(), array.ndim)


def padded(spec: P, ndim: int) -> tuple[Any, ...]:
    """The entries of a spec, of which the last may be left out."""
    return (*spec, *[None] * (ndim - len(spec)))


def spec_in(path: trees.Path, leaf: Any, mesh: Mesh | AbstractMesh, rules: Rules | None) -> P:
    """The PartitionSpec of a leaf on a mesh: of its box, of its array, or none.

    Raises:
      ValueError: for a box's name that is no axis of the mesh.
    """
    leaf = codes(leaf)
    if not isinstance(leaf, nn.Partitioned):
        kind = getattr(leaf, "sharding", None)
        return kind.spec if isinstance(kind, NamedSharding) else P()
    spec: Any = leaf.get_partition_spec()
    if isinstance(leaf, nn.LogicallyPartitioned):  # the names in other boxes are the mesh's own
        known = rules if rules is not None else leaf.rules or nn.get_logical_axis_rules()
        spec = logical_to_mesh_axes(leaf.names, known) if known else spec
    for axis in (axis for entry in spec or () for axis in mesh_axes(entry)):
        if axis not in mesh.axis_names:
            raise ValueError(
                f"{trees.dotted(path)!r} has an axis called {axis!r}, which is none of the mesh's "
                f"{mesh.axis_names}: give rules=[({axis!r}, {mesh.axis_names[0]!r}), ...], with "
                "None for an axis that is not divided"
            )
    return spec or P()


def state_sharding(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of a train state: an array's own, and for what is on no mesh, all of this one.

    An optimizer makes its moments where the scales are, but counts its steps on one device: that
    can't be restored next to them.

    Args:
      state: any tree of arrays, as `tx.init(trainable)` or `nnx.state(optimizer)`.
      mesh: the base's.

    Returns:
      A tree of `NamedSharding` like `state`, for `jax.device_put`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> state = optax.adam(1e-3).init({"gamma": jnp.ones((2, 4))})
      >>> state = jax.device_put(state, state_sharding(state, mesh))
      >>> state[0].count.sharding.spec
      P()
    """

    def of(leaf):
        own = getattr(leaf, "sharding", None)
        return own if isinstance(own, NamedSharding) else NamedSharding(mesh, P())

    return jax.tree.map(of, state)


def _check_axes(field: str, axes: Sequence[str], mesh: Mesh | AbstractMesh) -> None:
    if isinstance(axes, str):
        raise TypeError(f"{field} must be a list of names, as in [{axes!r}], got {axes!r}")
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"{field}: {axis!r} is no axis of the mesh, which has {mesh.axis_names}"
            )


def _divided_more(
    axes: tuple[Any, ...],
    shape: tuple[int, ...],
    zero_axes: Sequence[str],
    mesh: Mesh | AbstractMesh,
) -> tuple[Any, ...]:
    """A gamma's axes, of which the last that can is divided along more axes of the mesh."""
    used = {axis for entry in axes for axis in mesh_axes(entry)}
    more = [axis for axis in zero_axes if axis not in used]
    for count in range(len(more), 0, -1):  # as many as can
        for i in reversed(range(len(axes))):
            entry = (*mesh_axes(axes[i]), *more[:count])
            if shape[i] % math.prod(mesh.shape[axis] for axis in entry) == 0:
                return (*axes[:i], entry, *axes[i + 1 :])
    return axes
