"""What checkpoints that hold scales alone rest on: noted beside them, and checked at resume."""

from __future__ import annotations

import json
import os
import uuid
from typing import Any

import jax

from randlora_jax import trees
from randlora_jax.adapters import named
from randlora_jax.checkpoint.base_types import base_types, tell_of_another_base
from randlora_jax.checkpoint.fingerprints import fingerprints
from randlora_jax.checkpoint.orbax_items import resolved
from randlora_jax.checks import check_config, check_variables, differences
from randlora_jax.config import RandLoraConfig

NAME = "randlora.json"


def pin_adapter(
    folder: str | os.PathLike[str], variables: trees.Tree, config: named.Configs
) -> None:
    """Ties a folder of checkpoints to the config and the bases that its scales are of.

    A trainer of somebody else's, as tunix's, saves what trains, and on other bases or with another
    alpha that would be another update, and no error. Called before the trainer is made, this notes
    what they are in a file in the folder; when a run is resumed, it checks them.

    Args:
      folder: where the checkpoints are, or will be.
      variables: as `adapt`, or `randlora_jax.nnx.variables`, gives them.
      config: the adapter's, or those of several by name.

    Of several processes, all must call it.

    Raises:
      ValueError: if the checkpoints there rest on another config, or on other bases. Where the base
        is quantised, and was not or otherwise, it warns.

    Example:
      >>> import tempfile, flax.linen as nn, jax.numpy as jnp
      >>> from randlora_jax.linen import RandLora
      >>> config = RandLoraConfig(r=2, target_modules="all-linear")
      >>> variables = RandLora(nn.Dense(3), config).init(jax.random.key(0), jnp.ones((1, 4)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   pin_adapter(folder, variables, config)
      ...   pin_adapter(folder, variables, config)
      ...   pin_adapter(folder, variables, config.replace(randlora_alpha=7))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ValueError: ...randlora_alpha...
    """
    check_variables(variables, "randlora", "randlora_bases")
    check_config(config, several=True)
    path, configs = resolved(folder) / NAME, named.by_name(config)
    bases = fingerprints({"randlora_bases": variables["randlora_bases"]})
    base: dict[str, str] = {}
    for name in configs if "params" in variables else ():
        base |= base_types({**variables, "randlora": named.scales_of(variables, name)})
    if not path.exists():
        if jax.process_index() == 0:
            described: dict[str, Any] = {"bases": bases} | ({"base": base} if base else {})
            described["configs"] = {name: one.to_dict() for name, one in configs.items()}
            _write(path, json.dumps(described, indent=2, sort_keys=True))
        return
    try:
        before: dict[str, Any] = json.loads(path.read_text())
        there = {n: RandLoraConfig.from_dict(c) for n, c in before["configs"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is cut short or altered: {error!r}") from None
    if there.keys() != configs.keys():
        raise ValueError(
            f"the checkpoints in {path.parent} are of the adapters {sorted(there)}, and not "
            f"{sorted(configs)}: give those, or another folder"
        )
    for name, one in configs.items():
        differ = differences(there[name], one)
        if differ:
            raise ValueError(
                f"the checkpoints in {path.parent} were trained with another config: {differ}. "
                "Give the model theirs, or another folder"
            )
    if before.get("bases") != bases:
        raise ValueError(
            f"the checkpoints in {path.parent} were trained on other bases than the model has: "
            "their dtype, or their values. Give the model those, or another folder"
        )
    if "params" in variables:
        tell_of_another_base(before.get("base", {}), base, stacklevel=2)


def _write(path: Any, text: str) -> None:
    """Writes a file at once, for processes that look for it meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
    new.write_text(text)
    new.replace(path)
