"""Several adapters by name on one base and one pair of bases."""

from randlora_jax.adapters.tables import Table, table
from randlora_jax.adapters.verbs import delete, insert, select, with_strength

__all__ = ["Table", "delete", "insert", "select", "table", "with_strength"]
