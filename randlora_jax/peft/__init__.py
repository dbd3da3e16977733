"""Adapters from PEFT and for PEFT, bit for bit: lambda, gamma and the bases are never recomputed.

PEFT holds a tensor for each module, Flax one for each stack of layers too: a `name_map` says where
a module of PEFT's is. Source of the format: PEFT 0.21.2, `utils/save_and_load.py`.

What changes on the way, and is said in a warning: `save_projection`, since jax can't draw torch's
bases from their seed, nor torch jax's; and `target_modules` with `layers_to_transform` where, by
the other side's names, they would not mean the same modules. What `merge` gives needs no PEFT: it
is the plain weights of the base.
"""

from randlora_jax.peft.folders import load_adapter, module_names, save_adapter
from randlora_jax.peft.name_maps import (
    NameMap,
    gemma_name_map,
    gpt2_name_map,
    llama_name_map,
    tunix_name_map,
)

__all__ = [
    "NameMap",
    "gemma_name_map",
    "gpt2_name_map",
    "llama_name_map",
    "load_adapter",
    "module_names",
    "save_adapter",
    "tunix_name_map",
]
