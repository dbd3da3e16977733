"""The description of an adapter that its checkpoint carries, and whether it is still true."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from randlora_jax import bases as bases_lib
from randlora_jax import trees
from randlora_jax.checkpoint.base_types import base_types
from randlora_jax.checkpoint.fingerprints import check_dtypes, fingerprints, name_of, shape_of
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.stored import possible_features, sites_of
from randlora_jax.training import split

FORMAT = 1
MARK = "randlora_format"  # the key that tells an adapter from other checkpoints


class BadAdapter(ValueError):
    """What is wrong with a checkpoint, in words that follow its name."""


def damaged(what: object) -> BadAdapter:
    """For a checkpoint that is not what was saved."""
    return BadAdapter(f"is cut short or altered: {what}")


@dataclasses.dataclass(frozen=True)
class BasesRecord:
    """How the bases were drawn.

    Attributes:
      generator: the name of the draw; see `bases.GENERATOR`.
      max_dim, min_dim, dtype: what it was called with.
      fingerprint: of each array.
      shared_dims: the sizes that PEFT gives them, if others.
    """

    generator: str
    max_dim: int
    min_dim: int
    dtype: str
    fingerprint: dict[str, str]
    shared_dims: Sequence[int] | None = None

    @classmethod
    def of(cls, bases: bases_lib.Bases, features: Sequence[tuple[int, int]]) -> BasesRecord:
        A, B = bases["randlora_A"], bases["randlora_B"]
        sizes = B.shape[0], A.shape[2]
        shared = bases_lib.shared_dims(features) if features else sizes
        other = None if shared == sizes else shared
        return cls(bases_lib.GENERATOR, *sizes, str(A.dtype), fingerprints(bases), other)

    def draw(
        self, config: RandLoraConfig, where: jax.sharding.Sharding | None = None
    ) -> bases_lib.Bases | None:
        """The bases once more, each device its own part; None if they would be others."""
        dtype = jnp.float32 if self.dtype == "int8" else self.dtype
        make = lambda: bases_lib.draw(config, self.max_dim, self.min_dim, dtype)
        bases = jax.jit(make, out_shardings=where)() if where else make()
        return bases if fingerprints(bases) == self.fingerprint else None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint of an adapter holds.

    Attributes:
      config: the adapter's.
      bases: of its bases, whether they are in it or not.
      arrays: the fingerprint of every array in it, by path.
      base: as `base_types` tells of the base that it was trained on; nothing of one in floats.
    """

    config: RandLoraConfig
    bases: BasesRecord
    arrays: dict[str, str]
    base: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def holds_bases(self) -> bool:
        return any(name.startswith("randlora_bases/") for name in self.arrays)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it, with a digest of itself."""
        bases = {k: v for k, v in dataclasses.asdict(self.bases).items() if v is not None}
        described = {
            MARK: FORMAT,
            "config": self.config.to_dict(),
            "bases": bases,
            "arrays": self.arrays,
            **({"base": self.base} if self.base else {}),
        }
        return {**described, "digest": _digest(described)}

    @classmethod
    def from_dict(cls, described: Any) -> Manifest:
        """The inverse of `to_dict`.

        Raises:
          BadAdapter: if it is of another format, or not what was saved.
        """
        if not isinstance(described, Mapping) or MARK not in described:
            raise damaged("it has no description of an adapter")
        if described[MARK] != FORMAT:
            raise BadAdapter(
                f"has format {described[MARK]!r}, and this library reads {FORMAT}: install the one "
                "that wrote it, or a newer one"
            )
        rest = {key: value for key, value in described.items() if key != "digest"}
        if described.get("digest") != _digest(rest):
            raise damaged("its config is not what was saved")
        config = RandLoraConfig.from_dict(described["config"])
        known = {f.name for f in dataclasses.fields(BasesRecord)}  # a newer one may say more
        bases = {name: value for name, value in described["bases"].items() if name in known}
        arrays, base = dict(described["arrays"]), dict(described.get("base", {}))
        return cls(config, BasesRecord(**bases), arrays, base)

    def check_dtypes(self) -> None:
        """Raises BadAdapter for arrays that JAX would read as narrower ones."""
        for name, text in self.arrays.items():
            dtype = text.partition("[")[0]
            if jax.dtypes.canonicalize_dtype(dtype) != dtype:
                raise BadAdapter(f"has {name} in {dtype}: set jax_enable_x64 to read it")

    def check_shapes(self, shapes: trees.Tree) -> None:
        """Raises BadAdapter where arrays can't be those that were saved: before they are read."""
        found = {name_of(path): shape_of(leaf) for path, leaf in trees.items(shapes)}
        _compare(found, {name: text.partition(":")[0] for name, text in self.arrays.items()})

    def check_arrays(self, arrays: trees.Tree) -> None:
        """Raises BadAdapter unless every bit of the arrays is what was saved."""
        _compare(fingerprints(arrays), self.arrays)

    def bases_among(
        self, arrays: trees.Tree, where: jax.sharding.Sharding | None = None
    ) -> bases_lib.Bases:
        """The bases as they were saved; or drawn again, and verified."""
        if "randlora_bases" in arrays:
            return arrays["randlora_bases"]
        bases = self.bases.draw(self.config, where)
        if bases is None:
            raise BadAdapter(
                f"has no bases, and projection_prng_key={self.config.projection_prng_key} now "
                f"draws others (it was saved with the generator {self.bases.generator}, this is "
                f"{bases_lib.GENERATOR})"
            )
        return bases


def pack(variables: trees.Tree, config: RandLoraConfig) -> tuple[dict[str, Any], Manifest]:
    """The arrays of an adapter, and their description.

    Raises:
      ValueError: for `save_projection=False` with bases that the seed does not draw, for scales
        that don't fit the config or the base, and for dtypes that can't be saved or read back.
    """
    check_variables(variables, "params", "randlora", "randlora_bases")
    check_config(config)
    trainable, _ = split(variables, config)
    arrays, bases = trees.unboxed(trainable), dict(variables["randlora_bases"])
    check_dtypes({**arrays, "randlora_bases": bases})
    bases_lib.check_rank(config, bases)
    # What is written must be readable: so it is asked what load asks.
    features = possible_features(variables, config) if variables.get("params") else []
    record = BasesRecord.of(bases, features)
    if config.save_projection:
        arrays["randlora_bases"] = bases
    elif record.draw(config) is None:
        raise ValueError(
            "save_projection=False, but these bases are not those that projection_prng_key="
            f"{config.projection_prng_key} draws, and would be lost: set save_projection=True"
        )
    base = base_types(variables) if variables.get("params") else {}
    return arrays, Manifest(config, record, fingerprints(arrays), base)


def attach(arrays: trees.Tree, config: RandLoraConfig, variables: trees.Tree) -> dict[str, Any]:
    """Puts an adapter's arrays, bases among them, onto a base.

    Raises:
      BadAdapter: if they don't fit it.
    """
    loaded = {**variables, **{k: arrays[k] for k in ("randlora", "randlora_bases")}}
    try:
        sites_of(loaded, config, guess=True)
    except ValueError as error:
        raise BadAdapter(f"does not fit: {error}") from None
    params = dict(trees.items(variables["params"]))
    for path, leaf in trees.items(arrays.get("params", {})):
        if path not in params or trees.unboxed(params[path]).shape != leaf.shape:
            raise BadAdapter(
                f"has a trained {trees.dotted(path)!r} of shape {leaf.shape}, "
                "which the base has not: it is of another model"
            )
        params[path] = trees.replaced(params[path], leaf)
    return {**loaded, "params": trees.build(params)}


def _compare(found: dict[str, str], expected: dict[str, str]) -> None:
    for name in sorted(set(found) | set(expected)):
        if found.get(name) != expected.get(name):
            raise damaged(f"{name} is not what was saved")


def _digest(described: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
