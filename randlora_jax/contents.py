"""What a checkpoint of an adapter holds, and whether it is still what was saved."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from randlora_jax import bases as bases_lib
from randlora_jax import merging, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.training import split

FORMAT = 1
MARK = "randlora_format"  # the key that tells an adapter from other checkpoints


def pack(variables: trees.Tree, config: RandLoraConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of an adapter, and their description, which JSON can hold.

    Raises:
      ValueError: for `save_projection=False` with bases that the seed does not draw.
    """
    trainable, _ = split(variables, config)
    bases = dict(variables["randlora_bases"])
    A, B = bases["randlora_A"], bases["randlora_B"]
    drawn = {
        "generator": bases_lib.GENERATOR,
        "max_dim": B.shape[0],
        "min_dim": A.shape[2],
        "dtype": str(A.dtype),
        "fingerprint": fingerprints(bases),
    }
    arrays = nn.unbox(trainable)
    if config.save_projection:
        arrays["randlora_bases"] = bases
    elif fingerprints(_draw_again(config, drawn)) != drawn["fingerprint"]:
        raise ValueError(
            "save_projection=False, but these bases are not those that projection_prng_key="
            f"{config.projection_prng_key} draws, and would be lost: set save_projection=True"
        )
    description = {
        MARK: FORMAT,
        "config": config.to_dict(),
        "bases": drawn,
        "arrays": fingerprints(arrays),
    }
    return arrays, {**description, "digest": _digest(description)}


def check_description(description: Any, shapes: trees.Tree, source: str) -> RandLoraConfig:
    """Verifies all that can be without the arrays: so nothing is read that was not saved."""
    if not isinstance(description, dict) or MARK not in description:
        raise ValueError(f"{source} is cut short or altered: it has no description of an adapter")
    if description[MARK] != FORMAT:
        raise ValueError(
            f"{source} has format {description[MARK]!r}, and this library reads {FORMAT}: "
            "install the one that wrote it, or a newer one"
        )
    rest = {key: value for key, value in description.items() if key != "digest"}
    if description.get("digest") != _digest(rest):
        raise ValueError(f"{source} is cut short or altered: its config is not what was saved")
    found = {_name(path): _shape(leaf) for path, leaf in trees.items(shapes)}
    expected = {name: text.partition(":")[0] for name, text in description["arrays"].items()}
    _compare(found, expected, source)
    return RandLoraConfig.from_dict(description["config"])


def check_arrays(arrays: trees.Tree, description: dict[str, Any], source: str) -> None:
    """Verifies every bit of the arrays."""
    _compare(fingerprints(arrays), description["arrays"], source)


def bases_of(
    arrays: trees.Tree,
    description: dict[str, Any],
    config: RandLoraConfig,
    source: str,
    where: jax.sharding.Sharding | None = None,
) -> bases_lib.Bases:
    """The bases as they were saved; or drawn again, verified, each device its own part."""
    if "randlora_bases" in arrays:
        return arrays["randlora_bases"]
    bases = _draw_again(config, description["bases"], where)
    if fingerprints(bases) != description["bases"]["fingerprint"]:
        raise ValueError(
            f"{source} has no bases, and projection_prng_key={config.projection_prng_key} now "
            f"draws others (it was saved with the generator {description['bases']['generator']}, "
            f"this is {bases_lib.GENERATOR})"
        )
    return bases


def attach(
    arrays: trees.Tree, config: RandLoraConfig, variables: trees.Tree, source: str
) -> dict[str, Any]:
    """Puts an adapter's arrays, bases among them, onto a base that they fit."""
    whole = {**variables, **{k: arrays[k] for k in ("randlora", "randlora_bases")}}
    try:
        for _ in merging.adapted(whole, config, ambiguous=True):
            pass  # each is checked as it is found
    except ValueError as error:
        raise ValueError(f"{source} does not fit: {error}") from None
    params = dict(trees.items(variables["params"]))
    for path, leaf in trees.items(arrays.get("params", {})):
        if path not in params or nn.unbox(params[path]).shape != leaf.shape:
            raise ValueError(
                f"{source} has a trained {'.'.join(path)!r} of shape {leaf.shape}, "
                "which the base has not: it is of another model"
            )
        params[path] = nn.meta.replace_boxed(params[path], leaf)
    return {**whole, "params": trees.build(params)}


def fingerprints(tree: trees.Tree) -> dict[str, str]:
    """By path: dtype, shape and 64 bits that depend on every bit and its place.

    Exact, and the same however the arrays are sharded.
    """
    return {
        _name(path): f"{_shape(leaf)}:" + "".join(f"{int(half):08x}" for half in _sums(leaf))
        for path, leaf in trees.items(tree)
    }


def _name(path: trees.Path) -> str:
    return "/".join(path)


def _shape(array: Any) -> str:
    return f"{np.dtype(array.dtype)}{list(array.shape)}"


def _compare(found: dict[str, str], expected: dict[str, str], source: str) -> None:
    for name in sorted(set(found) | set(expected)):
        if found.get(name) != expected.get(name):
            raise ValueError(f"{source} is cut short or altered: {name} is not what was saved")


def _digest(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _draw_again(config, drawn, where=None) -> bases_lib.Bases:
    dtype = jnp.float32 if drawn["dtype"] == "int8" else drawn["dtype"]
    make = lambda: bases_lib.draw(config, drawn["max_dim"], drawn["min_dim"], dtype)
    return jax.jit(make, out_shardings=where)() if where else make()


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
