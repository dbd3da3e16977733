"""RandLoRA (Albert et al., ICLR 2025) for JAX and Flax; `linen` holds the module transform."""

from randlora_jax import adapters, peft
from randlora_jax.bases import draw as draw_bases
from randlora_jax.budget import matching_config, num_parameters
from randlora_jax.checkpoint import (
    AdapterRestore,
    AdapterSave,
    load_adapter,
    pin_adapter,
    save_adapter,
)
from randlora_jax.config import RandLoraConfig
from randlora_jax.merging import merge
from randlora_jax.ops import RandLoraDotGeneral, delta_weight
from randlora_jax.registry import register_layer
from randlora_jax.sharding import sharding, state_sharding
from randlora_jax.summary import summary
from randlora_jax.training import combine, labels, partition, split

__version__ = "0.1.0"

__all__ = [
    "AdapterRestore",
    "AdapterSave",
    "RandLoraConfig",
    "RandLoraDotGeneral",
    "adapters",
    "combine",
    "delta_weight",
    "draw_bases",
    "labels",
    "load_adapter",
    "matching_config",
    "merge",
    "num_parameters",
    "partition",
    "peft",
    "pin_adapter",
    "register_layer",
    "save_adapter",
    "sharding",
    "split",
    "state_sharding",
    "summary",
]
