"""Adapters as Orbax sees them: one handler for our own folders and for a user's checkpoints."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from randlora_jax import trees
from randlora_jax.checkpoint.base_types import base_types, tell_of_another_base
from randlora_jax.checkpoint.manifest import MARK, BadAdapter, Manifest, attach, damaged, pack
from randlora_jax.checks import check_config, check_same_config, check_variables
from randlora_jax.config import RandLoraConfig


def read_adapter(
    path: str | os.PathLike[str], where: Sharding | None = None
) -> tuple[dict[str, Any], Manifest]:
    """An adapter without a base, verified: its arrays, and how it was described.

    The bases are among the arrays, drawn again if they were not saved.

    Raises:
      FileNotFoundError, ValueError: as `load_adapter`.
    """
    folder, where = resolved(path), where or _everywhere()
    if not is_adapter(folder):
        peft = (folder / "adapter_config.json").exists()
        hint = "it is one of PEFT's, which rl.peft.load_adapter reads" if peft else ""
        hint = hint or "nothing in it that save_adapter wrote"
        raise FileNotFoundError(f"{folder} is no adapter of this library: {hint}")
    try:
        arrays, manifest = _read_arrays(folder, where)
        return {**arrays, "randlora_bases": manifest.bases_among(arrays, where)}, manifest
    except BadAdapter as error:
        raise ValueError(f"{folder} {error}") from error


def restore(
    folder: epath.Path, variables: trees.Tree, config: RandLoraConfig | None
) -> tuple[dict[str, Any], RandLoraConfig]:
    """What an `AdapterRestore` of a folder gives."""
    return _AdapterHandler().restore(folder, args=AdapterRestore(variables, config))


def _read_arrays(path: epath.Path, where: Sharding) -> tuple[dict[str, Any], Manifest]:
    handler = ocp.StandardCheckpointHandler()
    try:
        saved = handler.metadata(path)
        manifest, shapes = Manifest.from_dict(saved.custom_metadata), dict(saved.tree)
        manifest.check_dtypes()
        manifest.check_shapes(shapes)
        # The devices that it was saved from need not be here: the shardings are ours.
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes
        )
        arrays = handler.restore(path, args=ocp.args.StandardRestore(wanted))
        manifest.check_arrays(arrays)
    except BadAdapter:
        raise
    except Exception as error:  # whatever a damaged file makes Orbax and its parsers raise
        raise damaged(error) from error
    return arrays, manifest


class _AdapterHandler(ocp.StandardCheckpointHandler):
    """What `AdapterSave` and `AdapterRestore` run on; Orbax makes it by itself."""

    async def async_save(
        self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None
    ) -> Any:
        return await super().async_save(directory, args=standard_save(args.variables, args.config))

    def restore(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        check_variables(args.variables, "params")
        if args.config is not None:
            check_config(args.config)
        arrays, manifest = read_adapter(directory, _everywhere(args.variables))
        try:
            if args.config is not None:
                check_same_config(manifest.config, args.config)
            loaded = attach(arrays, manifest.config, args.variables)
        except ValueError as error:
            raise ValueError(f"{directory} {error}") from None
        tell_of_another_base(manifest.base, base_types(loaded), stacklevel=6)
        return loaded, manifest.config


@ocp.args.register_with_handler(_AdapterHandler, for_save=True)
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

    def __init__(self, variables: trees.Tree, config: RandLoraConfig) -> None:
        self.variables, self.config = variables, config


@ocp.args.register_with_handler(_AdapterHandler, for_restore=True)
@dataclasses.dataclass
class AdapterRestore(ocp.args.CheckpointArgs):
    """Restores what `AdapterSave` saved, as `load_adapter` does: (variables, config).

    Attributes:
      variables: the base's, `{"params": ...}`.
      config: that of a model which is there already, as for `load_adapter`.
    """

    variables: trees.Tree
    config: RandLoraConfig | None

    def __init__(self, variables: trees.Tree, config: RandLoraConfig | None = None) -> None:
        self.variables, self.config = variables, config


def standard_save(variables: trees.Tree, config: RandLoraConfig) -> ocp.args.StandardSave:
    """What Orbax's own handler saves of an adapter."""
    arrays, manifest = pack(variables, config)
    if jax.process_count() > 1:  # what each process has alone, Orbax takes as NumPy's
        local = lambda a: np.asarray(a) if a.is_fully_addressable else a
        arrays = jax.tree.map(local, arrays)
    return ocp.args.StandardSave(arrays, custom_metadata=manifest.to_dict())


def is_adapter(path: epath.Path) -> bool:
    """Whether the folder looks like one that `save_adapter` made."""
    described = path / "_METADATA"
    return described.exists() and f'"{MARK}"'.encode() in described.read_bytes()


def resolved(path: str | os.PathLike[str]) -> epath.Path:
    """The path from the root, as Orbax wants it; one in the cloud is so already."""
    given = epath.Path(path)
    return given if "://" in str(given) else given.resolve()


def _everywhere(variables: trees.Tree | None = None) -> Sharding:
    """Where arrays are restored to: to all devices of the base, or of several processes."""
    leaves = [trees.array_of(leaf) for _, leaf in trees.items(variables or {})]
    found = [getattr(leaf, "sharding", None) for leaf in leaves]
    for sharding in found:
        if isinstance(sharding, NamedSharding):  # the rest of the base may be on no mesh by itself
            return NamedSharding(sharding.mesh, PartitionSpec())
    for sharding in found:
        if isinstance(sharding, SingleDeviceSharding) and jax.process_count() == 1:
            return sharding
    if jax.process_count() == 1:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())
