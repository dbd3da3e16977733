"""RandLoRA for Flax NNX: `inject` adapts the linear layers of any model, in place."""

from randlora_jax.nnx.classes import lend_bases
from randlora_jax.nnx.layers import RandLoraBasis, RandLoraParam
from randlora_jax.nnx.model import inject, load_adapter, merge, remove, set_active
from randlora_jax.nnx.state import ADDED, trainable, update, variables

__all__ = [
    "ADDED",
    "RandLoraBasis",
    "RandLoraParam",
    "inject",
    "lend_bases",
    "load_adapter",
    "merge",
    "remove",
    "set_active",
    "trainable",
    "update",
    "variables",
]
