"""RandLoRA for Flax NNX: `inject` adapts the linear layers of any model, in place."""

from randlora_jax.nnx.adapters import delete, insert, set_active, set_strength
from randlora_jax.nnx.layers import RandLoraParam
from randlora_jax.nnx.layout import set_layout
from randlora_jax.nnx.lending import RandLoraBasis, lend_bases
from randlora_jax.nnx.model import inject, load_adapter, merge, remove
from randlora_jax.nnx.quantising import quantize
from randlora_jax.nnx.state import ADDED, trainable, update, variables

__all__ = [
    "ADDED",
    "RandLoraBasis",
    "RandLoraParam",
    "delete",
    "inject",
    "insert",
    "lend_bases",
    "load_adapter",
    "merge",
    "quantize",
    "remove",
    "set_active",
    "set_layout",
    "set_strength",
    "trainable",
    "update",
    "variables",
]
