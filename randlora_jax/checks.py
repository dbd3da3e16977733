"""The one check of what users hand over: it knows the usual mix-ups and says what to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from randlora_jax.config import ALL_LINEAR, RandLoraConfig

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
        if BASES in needed and "randlora_A" not in variables[BASES]:
            _refuse_part_of_a_model(variables[BASES])
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


def _refuse_part_of_a_model(bases: Any) -> None:
    """Raises a ValueError for bases that are not at the root: RandLora is within another module."""
    path = []
    while isinstance(bases, Mapping) and len(bases) == 1 and "randlora_A" not in bases:
        ((name, bases),) = bases.items()
        path.append(f"[{name!r}]")
    within = isinstance(bases, Mapping) and "randlora_A" in bases
    cure = (
        "the adapted model is a part of another one, so take that part of each collection: "
        f"{{name: tree{''.join(path)} for name, tree in variables.items()}}"
        if within
        else "RandLora(base, config).adapt(variables, x) gives them"
    )
    raise ValueError(f"variables has no 'randlora_A' in 'randlora_bases': {cure}")


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
    if isinstance(getattr(config, "config", None), RandLoraConfig):
        kind = type(config).__name__
        raise TypeError(f"config must be a RandLoraConfig, got a {kind}: give its .config")
    raise TypeError(f"config must be a RandLoraConfig, got {_mix_up(config)}")


# What a loaded adapter does not depend on, or PEFT alone reads.
_OF_NO_WEIGHT = {
    "save_projection",
    "init_weights",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
}


def check_same_config(saved: RandLoraConfig, wanted: RandLoraConfig) -> None:
    """Raises a ValueError for a saved config by which a model would compute or train otherwise.

    The message has the fields that differ; it follows the adapter's name.
    """
    differ = differences(saved, wanted)
    if differ:
        raise ValueError(
            f"has another config than the model: {differ}. Build the model with the config that "
            "load_adapter returns, as RandLora(base_model, config)"
        )


def differences(saved: RandLoraConfig, wanted: RandLoraConfig) -> str:
    """The fields of a saved config and a model's by which they compute or train otherwise."""
    differ = []
    for field in dataclasses.fields(RandLoraConfig):
        pair = [getattr(config, field.name) for config in (saved, wanted)]
        there, here = (_meaning(field.name, value) for value in pair)
        if field.name not in _OF_NO_WEIGHT and there != here:
            differ.append(f"{field.name} is {pair[0]!r} there and {pair[1]!r} in the model")
    return "; ".join(differ)


def _meaning(field: str, value: Any) -> Any:
    """The same for values of a config that mean the same."""
    if field == "projection_prng_key":
        return value & 0xFFFFFFFF
    if field in ("layers_to_transform", "layers_pattern") and isinstance(value, (int, str)):
        value = (value,)
    if field == "target_modules" and isinstance(value, str) and value.lower() == ALL_LINEAR:
        return ALL_LINEAR
    return frozenset(value) or None if isinstance(value, tuple) else value


def _mix_up(value: Any) -> str:
    """What was given, and what to write instead."""
    if isinstance(value, nnx.Module):
        return "an NNX model: give randlora_jax.nnx.variables(model)"
    if isinstance(value, nn.Module):
        return "a Linen module: give the variables that its init or adapt returns"
    if isinstance(value, jax.Array):
        key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype == jnp.uint32
        kind = "a random key: init(key, x) makes variables" if key else "an array"
        return f"{kind}; the variables come first, then the inputs, as in adapt(variables, x)"
    if isinstance(value, RandLoraConfig):
        return "a RandLoraConfig: the variables come first, then the config"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], RandLoraConfig):
        return "the pair that load_adapter returns: write `variables, config = ...` first"
    if isinstance(value, Mapping) and {PARAMS, SCALES, BASES} & set(value):
        return "variables: they come first, then the config"
    return f"{type(value).__name__}: {value!r}"[:200]
