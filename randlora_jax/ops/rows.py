"""The scales of each row of a batch, out of a table of adapters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from randlora_jax.bases import SCALING, Bases
from randlora_jax.placement import has_values, whole


def checked_ids(ids: Any, bases: Bases | None) -> jax.Array | None:
    """The numbers of adapters, -1 for none; None where the scales are no table's.

    Args:
      ids: as a user gives them.
      bases: with what a table has beside them; None where no adapter is active.

    Raises:
      TypeError, ValueError: for what is no integer, for concrete numbers beyond the capacity, and
        for a table without numbers or numbers without a table.
    """
    if bases is None:
        return None
    if (SCALING in bases) != (ids is not None):
        raise ValueError(
            "adapter_ids say which adapters of a table are meant, and there is none: variables, "
            "table = rl.adapters.table(variables, configs, capacity=64) makes it"
            if ids is not None
            else f"the adapters are a table of {bases[SCALING].shape[0]}, so the call needs "
            "adapter_ids=table.ids(['name', '__base__', ...]), one for each example"
        )
    if ids is None:
        return None
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"adapter_ids must be integers, as table.ids(names) gives, not {ids.dtype}")
    ids, capacity = jnp.asarray(ids), bases[SCALING].shape[0]
    if has_values(ids) and ids.is_fully_addressable:
        beyond = sorted({int(i) for i in np.asarray(ids).ravel() if not -1 <= i < capacity})
        if beyond:
            raise ValueError(
                f"adapter_ids has {beyond}, but the table has {capacity} slots, from 0, and -1 is "
                "the model without an adapter: table.ids(names) gives the numbers"
            )
    return ids


def scales_of_rows(
    scales: tuple[jax.Array, jax.Array], scaling: jax.Array, ids: jax.Array, stacked: int
) -> tuple[jax.Array, jax.Array]:
    """Lambda (stack..., rows..., r, n) and gamma, of a table's (capacity, stack..., r, n).

    A row of another number than those of the slots has zeros, whatever the slots hold: its lambda
    is computed without them.

    Args:
      scaling: (capacity,), with which lambda is multiplied.
      ids: (rows...), integers.
      stacked: how many axes of a stack inside the layer the scales have.
    """
    lam, gamma, scaling = (_taken(array, ids) for array in (*scales, scaling))
    lam = lam * scaling.reshape(*ids.shape, *[1] * (lam.ndim - ids.ndim)).astype(lam.dtype)
    behind = lambda a: jnp.moveaxis(a, range(ids.ndim), range(stacked, stacked + ids.ndim))
    return (behind(lam), behind(gamma)) if stacked else (lam, gamma)


def _taken(table: jax.Array, ids: jax.Array) -> jax.Array:
    options: dict[str, Any] = {"mode": "fill", "fill_value": 0, "wrap_negative_indices": False}
    sharding = jax.typeof(ids).sharding
    kinds = (*(sharding.mesh.axis_types or ()), *(jax.typeof(table).sharding.mesh.axis_types or ()))
    if AxisType.Explicit in kinds:
        spec = PartitionSpec(*sharding.spec, *[None] * (ids.ndim - len(sharding.spec)))
        mesh = sharding.mesh if not sharding.mesh.empty else jax.typeof(table).sharding.mesh
        options["out_sharding"] = NamedSharding(
            mesh, PartitionSpec(*spec, *[None] * (table.ndim - 1))
        )
    return whole(table).at[ids].get(**options)
