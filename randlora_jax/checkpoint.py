"""Adapters on disk, through Orbax: folders of their own, or items of a user's checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import uuid
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from randlora_jax import contents, trees
from randlora_jax.config import RandLoraConfig


def save_adapter(
    path: str | epath.Path,
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
    path = _resolved(path)
    if path.exists() and not (overwrite and is_adapter(path)):
        raise FileExistsError(
            f"{path} exists already"
            + (" and is no adapter" if overwrite else ": give another path or overwrite=True")
        )
    args = _save_args(variables, config)
    here = uuid.uuid4().int % 2**32  # as the first process has it, if there are several
    mark = f"{int(multihost_utils.broadcast_one_to_all(np.uint32(here))):08x}"
    new = path.parent / f"{path.name}.new-{mark}"
    first = jax.process_index() == 0
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(new, args=args)
        if first:
            replaced = path.parent / f"{_replaced(path)}{mark}"
            if path.exists():
                path.rename(replaced)
            new.rename(path)
    except Exception as error:  # Orbax and what it writes with raise what they like
        raise OSError(f"{path} was not saved; what was there is as it was: {error}") from error
    finally:
        for rest in path.parent.glob(f"{new.name}*") if first else ():
            _remove(rest)
    for old in path.parent.glob(f"{_replaced(path)}*") if first else ():
        _remove(old)
    multihost_utils.sync_global_devices(f"randlora_jax saved {path}")


def load_adapter(
    path: str | epath.Path, variables: trees.Tree
) -> tuple[dict[str, Any], RandLoraConfig]:
    """Loads an adapter onto a base, and verifies it: shapes, every array's checksum, the bases.

    What is loaded is whole on every device of the base's mesh: `sharding` says where to put it.

    Args:
      path: a folder that `save_adapter` made, or the item of an `AdapterSave` in a checkpoint. It
        can come from any mesh, any number of devices and processes, from Linen or NNX.
      variables: the base's, `{"params": ...}`; it is not changed and not copied.

    Returns:
      (variables, config), the variables as `adapt` returns them.

    Raises:
      FileNotFoundError: if there is no adapter at `path`.
      ValueError: if it is cut short or altered, of another model, of a newer format, or if its
        seed no longer draws its bases.
    """
    path = _resolved(path)
    while True:
        before = _identity(path)
        try:
            return AdapterHandler().restore(_present(path), AdapterRestore(variables))
        except (ValueError, FileNotFoundError):
            if _identity(path) == before:
                raise  # else another adapter was saved over this one meanwhile


def read(
    path: str | epath.Path, where: Sharding | None = None
) -> tuple[dict[str, Any], RandLoraConfig, dict[str, Any]]:
    """An adapter without a base, verified: its arrays, its config, and how it was described.

    The bases are among the arrays, drawn again if they were not saved.

    Raises:
      FileNotFoundError, ValueError: as `load_adapter`.
    """
    path, where = _resolved(path), where or _everywhere()
    if not is_adapter(path):
        raise FileNotFoundError(f"{path} is no adapter: nothing in it that save_adapter wrote")
    source, handler = str(path), ocp.StandardCheckpointHandler()
    with _damage(source):
        saved = handler.metadata(path)
        shapes = dict(saved.tree)
        config = contents.check_description(saved.custom_metadata, shapes, source)
        # The devices that it was saved from need not be here: the shardings are ours.
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes
        )
        arrays = handler.restore(path, args=ocp.args.StandardRestore(wanted))
        contents.check_arrays(arrays, saved.custom_metadata, source)
    bases = contents.bases_of(arrays, saved.custom_metadata, config, source, where)
    return {**arrays, "randlora_bases": bases}, config, saved.custom_metadata


class AdapterHandler(ocp.StandardCheckpointHandler):
    """What `AdapterSave` and `AdapterRestore` run on; Orbax makes it by itself."""

    async def async_save(self, directory: Any, args: AdapterSave) -> Any:
        return await super().async_save(directory, args=_save_args(args.variables, args.config))

    def restore(self, directory: Any, args: AdapterRestore) -> Any:
        arrays, config, _ = read(directory, _everywhere(args.variables))
        return contents.attach(arrays, config, args.variables, str(directory)), config


@ocp.args.register_with_handler(AdapterHandler, for_save=True)
@dataclasses.dataclass
class AdapterSave(ocp.args.CheckpointArgs):
    """An adapter as an item of a user's own Orbax checkpoint, beside the optimizer's state.

    The item holds what `save_adapter` writes, and `load_adapter` reads it too.

    Attributes:
      variables, config: as for `save_adapter`.

    Example:
      >>> import pathlib, tempfile
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> from randlora_jax.linen import RandLora
      >>> config = RandLoraConfig(r=2, target_modules="all-linear")
      >>> variables = RandLora(nn.Dense(3), config).init(jax.random.key(0), jnp.ones((1, 4)))
      >>> base = {"params": variables["params"]}
      >>> folder = tempfile.TemporaryDirectory()
      >>> with ocp.CheckpointManager(pathlib.Path(folder.name)) as manager:
      ...     args = ocp.args.Composite(adapter=AdapterSave(variables, config),
      ...                               position=ocp.args.JsonSave({"batch": 7}))
      ...     saved = manager.save(7, args=args)
      ...     args = ocp.args.Composite(adapter=AdapterRestore(base),
      ...                               position=ocp.args.JsonRestore())
      ...     restored = manager.restore(7, args=args)
      >>> variables, config = restored.adapter
      >>> config.r, restored.position
      (2, {'batch': 7})
    """

    variables: trees.Tree
    config: RandLoraConfig


@ocp.args.register_with_handler(AdapterHandler, for_restore=True)
@dataclasses.dataclass
class AdapterRestore(ocp.args.CheckpointArgs):
    """Restores what `AdapterSave` saved, as `load_adapter` does: (variables, config).

    Attributes:
      variables: the base's, `{"params": ...}`.
    """

    variables: trees.Tree


def _save_args(variables: trees.Tree, config: RandLoraConfig) -> ocp.args.StandardSave:
    arrays, description = contents.pack(variables, config)
    if jax.process_count() > 1:  # what each process has alone, Orbax takes as NumPy's
        local = lambda a: np.asarray(a) if a.is_fully_addressable else a
        arrays = jax.tree.map(local, arrays)
    return ocp.args.StandardSave(arrays, custom_metadata=description)


def is_adapter(path: epath.Path) -> bool:
    """Whether the folder looks like one that `save_adapter` made."""
    described = path / "_METADATA"
    return described.exists() and f'"{contents.MARK}"'.encode() in described.read_bytes()


@contextlib.contextmanager
def _damage(source: str):
    """Whatever a damaged file makes Orbax and its parsers raise: it means the same to all."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(source):
            raise
        raise ValueError(f"{source} is cut short or altered: {error}") from error


def _everywhere(variables: trees.Tree | None = None) -> Sharding:
    """Where arrays are restored to: to all devices of the base, or of several processes."""
    found = (getattr(nn.unbox(x), "sharding", None) for _, x in trees.items(variables or {}))
    for sharding in found:
        if isinstance(sharding, NamedSharding):
            return NamedSharding(sharding.mesh, PartitionSpec())
        if isinstance(sharding, SingleDeviceSharding) and jax.process_count() == 1:
            return sharding
    if jax.process_count() == 1:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())


def _resolved(path: str | epath.Path) -> epath.Path:
    path = epath.Path(path)
    return path if "://" in str(path) else path.resolve()


def _replaced(path: epath.Path) -> str:
    """How a folder is called while another takes its place, less some letters of its own."""
    return f".{path.name}.replaced-"


def _present(path: epath.Path) -> epath.Path:
    """The path, or what a save that was killed between its two moves left of it."""
    if path.exists():
        return path
    return next(iter(sorted(path.parent.glob(f"{_replaced(path)}*"))), path)


def _identity(path: epath.Path) -> Any:
    """Differs if another folder took the place of this one."""
    try:
        found = os.stat(_present(path))
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _remove(path: epath.Path) -> None:
    with contextlib.suppress(OSError):
        path.rmtree() if path.is_dir() else path.unlink()
