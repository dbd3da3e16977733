"""Adapters on disk, through Orbax: the config, the scales, and the bases or how to draw them."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from randlora_jax import bases as bases_lib
from randlora_jax import merging, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.training import split

FORMAT = 1


def save_adapter(
    path: str | epath.Path,
    variables: trees.Tree,
    config: RandLoraConfig,
    *,
    overwrite: bool = False,
) -> None:
    """Saves what was trained, its config, and what restores its bases; never the base.

    It is written beside `path` and moved there when it is complete: a save that fails or is
    killed leaves what was there before.

    Args:
      path: a new folder, or with `overwrite` one that `save_adapter` made.
      variables: as `adapt` returned them, trained.
      config: with `save_projection=False` the file holds the seed and a fingerprint instead of the
        bases.

    Raises:
      FileExistsError: if there is something at `path` and `overwrite` is False.
      ValueError: for `save_projection=False` with bases that the seed does not draw.
    """
    path = _resolved(path)
    if path.exists() and not (overwrite and is_adapter(path)):
        raise FileExistsError(
            f"{path} exists already"
            + (" and is no adapter" if overwrite else ": give another path or overwrite=True")
        )
    content, metadata = pack(variables, config)
    new = path.parent / f"{path.name}.new-{uuid.uuid4().hex[:8]}"
    with _checkpointer() as checkpointer:
        checkpointer.save(
            new,
            args=ocp.args.Composite(
                adapter=ocp.args.StandardSave(content), metadata=ocp.args.JsonSave(metadata)
            ),
        )
    replaced = path.parent / f"{_replaced(path)}{uuid.uuid4().hex[:8]}"
    if path.exists():
        path.rename(replaced)
    new.rename(path)
    if replaced.exists():
        replaced.rmtree()


def load_adapter(
    path: str | epath.Path, variables: trees.Tree
) -> tuple[dict[str, Any], RandLoraConfig]:
    """Loads an adapter onto a base, and verifies it: shapes, every array's checksum, the bases.

    Args:
      path: a folder that `save_adapter` made.
      variables: the base's, `{"params": ...}`; it is not changed and not copied.

    Returns:
      (variables, config), the variables as `adapt` returns them.

    Raises:
      FileNotFoundError: if there is no adapter at `path`.
      ValueError: if it is cut short or altered, of another model, of a newer format, or if its
        seed no longer draws its bases.
    """
    path = _resolved(path)
    return unpack(*read(path), variables, str(path))


def read(path: str | epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `pack` made, as `save_adapter` wrote it to a folder; not verified yet.

    Raises:
      FileNotFoundError: if there is no adapter at `path`.
      ValueError: if it can't be read.
    """
    path = _resolved(path)
    if not path.exists():  # a save may have been killed between its two moves
        path = next(iter(path.parent.glob(f"{_replaced(path)}*")), path)
    if not is_adapter(path):
        raise FileNotFoundError(f"{path} is no adapter: it has no 'adapter' and 'metadata' in it")
    try:
        with _checkpointer() as checkpointer:
            saved = checkpointer.metadata(path).item_metadata["adapter"]
            whole = _everywhere()
            wanted = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
                dict(saved.tree),
            )
            # The devices it was saved from need not be here: the shardings are ours.
            read = checkpointer.restore(
                path,
                args=ocp.args.Composite(
                    adapter=ocp.args.StandardRestore(wanted), metadata=ocp.args.JsonRestore()
                ),
            )
    # Whatever a damaged file makes Orbax and its parsers raise, it means the same to the caller.
    except Exception as error:
        raise ValueError(f"{path} is cut short or altered: {error}") from error
    return read["adapter"], read["metadata"]


def _checkpointer() -> ocp.Checkpointer:
    handlers = {"adapter": ocp.StandardCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _everywhere() -> jax.sharding.Sharding:
    """Where arrays are restored to: one device, or all of those of several processes."""
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def is_adapter(path: epath.Path) -> bool:
    """Whether the folder looks like one that `save_adapter` made."""
    return (path / "adapter").exists() and (path / "metadata").exists()


def pack(variables: trees.Tree, config: RandLoraConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint of an adapter holds: a tree of arrays, and metadata for JSON."""
    trainable, _ = split(variables, config)
    bases = dict(variables["randlora_bases"])
    A, B = bases["randlora_A"], bases["randlora_B"]
    drawn = {
        "generator": bases_lib.GENERATOR,
        "max_dim": B.shape[0],
        "min_dim": A.shape[2],
        "dtype": str(A.dtype),
        "fingerprint": _fingerprints(bases),
    }
    content = nn.unbox(trainable)
    if config.save_projection:
        content["randlora_bases"] = bases
    elif _fingerprints(_draw_again(config, drawn)) != drawn["fingerprint"]:
        raise ValueError(
            "save_projection=False, but these bases are not those that projection_prng_key="
            f"{config.projection_prng_key} draws, and would be lost: set save_projection=True"
        )
    described = {
        "format": FORMAT,
        "config": config.to_dict(),
        "bases": drawn,
        "checksums": _fingerprints(content),
    }
    return content, {**described, "digest": _digest(described)}


def unpack(
    content: trees.Tree, metadata: dict[str, Any], variables: trees.Tree, source: str
) -> tuple[dict[str, Any], RandLoraConfig]:
    """Verifies what `pack` made against a base, and puts the two together."""
    version = metadata.get("format")
    if version != FORMAT:
        raise ValueError(
            f"{source} has format {version!r}, and this library reads {FORMAT}: "
            "install the one that wrote it, or a newer one"
        )
    digest = metadata.get("digest")
    if digest != _digest({k: v for k, v in metadata.items() if k != "digest"}):
        raise ValueError(f"{source} is cut short or altered: its config is not what was saved")
    checksums = _fingerprints(content)
    expected = metadata["checksums"]
    for name in sorted(set(checksums) | set(expected)):
        if checksums.get(name) != expected.get(name):
            raise ValueError(f"{source} is cut short or altered: {name} is not what was saved")
    config = RandLoraConfig.from_dict(metadata["config"])
    bases = content.get("randlora_bases")
    if bases is None:
        bases = _draw_again(config, metadata["bases"])
        if _fingerprints(bases) != metadata["bases"]["fingerprint"]:
            raise ValueError(
                f"{source} has no bases, and projection_prng_key={config.projection_prng_key} now "
                f"draws others (it was saved with the generator {metadata['bases']['generator']}, "
                f"this is {bases_lib.GENERATOR})"
            )
    whole = {**variables, "randlora": content["randlora"], "randlora_bases": bases}
    try:
        for _ in merging.adapted(whole, config, ambiguous=True):
            pass  # each is checked as it is found
    except ValueError as error:
        raise ValueError(f"{source} does not fit: {error}") from None
    params = dict(trees.items(variables["params"]))
    for path, leaf in trees.items(content.get("params", {})):
        if path not in params or nn.unbox(params[path]).shape != leaf.shape:
            raise ValueError(
                f"{source} has a trained {'.'.join(path)!r} of shape {leaf.shape}, "
                "which the base has not: it is of another model"
            )
        params[path] = nn.meta.replace_boxed(params[path], leaf)
    return {**whole, "params": trees.build(params)}, config


def _resolved(path: str | epath.Path) -> epath.Path:
    path = epath.Path(path)
    return path if "://" in str(path) else path.resolve()


def _replaced(path: epath.Path) -> str:
    """How a folder is called while another takes its place, less some letters of its own."""
    return f".{path.name}.replaced-"


def _digest(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _draw_again(config: RandLoraConfig, drawn: dict[str, Any]) -> bases_lib.Bases:
    dtype = jnp.float32 if drawn["dtype"] == "int8" else drawn["dtype"]
    return bases_lib.draw(config, drawn["max_dim"], drawn["min_dim"], dtype)


def _fingerprints(tree: trees.Tree) -> dict[str, str]:
    return {"/".join(path): _fingerprint(leaf) for path, leaf in trees.items(tree)}


def _fingerprint(array: jax.Array) -> str:
    """Shape, dtype and 64 bits that depend on every bit and its place: exact, however sharded."""
    return f"{array.dtype}{list(array.shape)}:" + "".join(f"{int(h):08x}" for h in _sums(array))


@jax.jit
def _sums(array):
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, bits).reshape(-1).astype(jnp.uint32)
    place = jax.lax.iota(jnp.uint32, words.size)

    def mixed(multiplier):  # odd multipliers and shifts: no two words of one place collide
        x = (words ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(multiplier)
        x = (x ^ (x >> 15)) * jnp.uint32(0x2C1B3C6D)
        return jnp.sum(x ^ (x >> 12), dtype=jnp.uint32)

    return mixed(0x85EBCA6B), mixed(0xC2B2AE35)
