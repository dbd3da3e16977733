"""The operation `y = x . (W + dW)` on arrays: its products, their cost, and their division."""

from randlora_jax.ops.costs import Strategy
from randlora_jax.ops.dot_general import Dropout, RandLoraDotGeneral, delta_weight

__all__ = ["Dropout", "RandLoraDotGeneral", "Strategy", "delta_weight"]
