"""Several adapters by name on one base and one pair of bases."""

from randlora_jax.adapters.named import delete, insert, select, with_strength

__all__ = ["delete", "insert", "select", "with_strength"]
