"""RandLoRA for Flax Linen: `RandLora` wraps a module and adapts its linear layers."""

from randlora_jax.linen.model import RandLora
from randlora_jax.linen.quantising import quantize

__all__ = ["RandLora", "quantize"]
