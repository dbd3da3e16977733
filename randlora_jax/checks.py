"""The one check of what users hand over: it knows the usual mix-ups and says what to write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import nnx

from randlora_jax.config import RandLoraConfig

PARAMS, SCALES, BASES = "params", "randlora", "randlora_bases"


def check_variables(variables: Any, *needed: str) -> None:
    """Raises a TypeError or ValueError for variables that lack one of the collections.

    Args:
      variables: what a public function was given.
      needed: of "params", "randlora" and "randlora_bases".
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must be a dictionary of collections, got {_mix_up(variables)}")
    missing = [name for name in needed if name not in variables]
    if not missing:
        return
    there = sorted(map(str, variables))
    if PARAMS in missing and SCALES in variables and BASES not in variables:
        cure = "what trains alone: rl.combine(trainable, frozen) gives the whole"
    elif PARAMS in missing and not {PARAMS, SCALES, BASES} & set(variables):
        cure = "parameters alone, it seems: give {'params': ...}"
    elif PARAMS in missing:
        cure = "no base: give its {'params': ...} too"
    else:
        cure = "no adapter: RandLora(base, config).adapt(variables, x) or rl.load_adapter adds one"
    raise ValueError(f"variables has the collections {there} and no {missing[0]!r}: {cure}")


def check_config(config: Any, *, several: bool = False) -> None:
    """Raises a TypeError for what is no config, or no single one.

    Args:
      several: whether configs by name will do.
    """
    names_adapters = isinstance(config, Mapping) and all(
        isinstance(one, RandLoraConfig) for one in config.values()
    )
    if isinstance(config, RandLoraConfig) or (several and names_adapters):
        return
    if names_adapters:
        raise TypeError(
            f"config names several adapters, {sorted(config)}: take one of them first, by "
            "rl.adapters.select(variables, config, name)"
        )
    raise TypeError(f"config must be a RandLoraConfig, got {_mix_up(config)}")


def _mix_up(value: Any) -> str:
    """What was given, and what to write instead."""
    if isinstance(value, nnx.Module):
        return "an NNX model: give randlora_jax.nnx.variables(model)"
    if isinstance(value, nn.Module):
        return "a Linen module: give the variables that its init or adapt returns"
    if isinstance(value, RandLoraConfig):
        return "a RandLoraConfig: the variables come first, then the config"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], RandLoraConfig):
        return "the pair that load_adapter returns: write `variables, config = ...` first"
    if isinstance(value, Mapping) and {PARAMS, SCALES, BASES} & set(value):
        return "variables: they come first, then the config"
    return f"{type(value).__name__}: {value!r}"[:200]
