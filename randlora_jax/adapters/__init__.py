"""Several adapters by name on one base and one pair of bases."""

from randlora_jax.adapters.named import insert, select

__all__ = ["insert", "select"]
