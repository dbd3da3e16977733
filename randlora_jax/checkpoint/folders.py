"""Adapters in folders of their own: saved all or nothing, loaded whole or refused."""

from __future__ import annotations

import os
import uuid
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from randlora_jax import atomic, trees
from randlora_jax.checkpoint.orbax_items import is_adapter, resolved, restore, standard_save
from randlora_jax.config import RandLoraConfig


def save_adapter(
    path: str | os.PathLike[str],
    variables: trees.Tree,
    config: RandLoraConfig,
    *,
    overwrite: bool = False,
) -> None:
    """Saves what was trained, its config, and what restores its bases; never the base.

    It is written beside `path` and moved there when it is complete: a save that fails or is
    killed leaves what was there before. Of several processes, all must call it.

    Args:
      path: a new folder, or with `overwrite` one that `save_adapter` made.
      variables: as `adapt` returned them, trained.
      config: with `save_projection=False` the file holds the seed and a fingerprint instead of the
        bases.

    Raises:
      FileExistsError: if there is something at `path` and `overwrite` is False.
      OSError: if it can't be written: no space, no permission.
      ValueError: for `save_projection=False` with bases that the seed does not draw.
    """
    folder = resolved(path)
    if folder.exists() and not (overwrite and is_adapter(folder)):
        raise FileExistsError(
            f"{folder} exists already"
            + (" and is no adapter" if overwrite else ": give another path or overwrite=True")
        )
    args = standard_save(variables, config)
    here = uuid.uuid4().int % 2**32  # as the first process has it, if there are several
    mark = f"{int(multihost_utils.broadcast_one_to_all(np.uint32(here))):08x}"
    first = jax.process_index() == 0
    try:
        with atomic.written_beside(folder, mark, cleans_up=first) as new:
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
                checkpointer.save(new, args=args)
            if first:
                # Orbax notes in it where the folder was made: no business of who gets the adapter.
                (new / "commit_success.txt").unlink(missing_ok=True)
                atomic.take_place(new, folder)
    except Exception as error:  # Orbax and what it writes with raise what they like
        raise OSError(f"{folder} was not saved; what was there is as it was: {error}") from error
    multihost_utils.sync_global_devices(f"randlora_jax saved {folder}")


def load_adapter(
    path: str | os.PathLike[str], variables: trees.Tree, config: RandLoraConfig | None = None
) -> tuple[dict[str, Any], RandLoraConfig]:
    """Loads an adapter onto a base, and verifies it: shapes, every array's checksum, the bases.

    What is loaded is whole on every device of the base's mesh: `sharding` says where to put it.

    Args:
      path: a folder that `save_adapter` made, or the item of an `AdapterSave` in a checkpoint. It
        can come from any mesh, any number of devices and processes, from Linen or NNX.
      variables: the base's, `{"params": ...}`; it is not changed and not copied.
      config: that of a model which is there already: an adapter with another one is refused.

    Returns:
      (variables, config), the variables as `adapt` returns them, of `RandLora(base_model, config)`.

    Raises:
      FileNotFoundError: if there is no adapter at `path`.
      ValueError: if it is cut short or altered, of another model or config, of a newer format, or
        if its seed no longer draws its bases.
    """
    return atomic.read(resolved(path), lambda folder: restore(folder, variables, config))
