"""The verbs of several adapters by name, whether each has a tree of its own or they are a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

from randlora_jax import trees
from randlora_jax.adapters import named, tables
from randlora_jax.adapters.named import Strength
from randlora_jax.adapters.tables import Table
from randlora_jax.config import RandLoraConfig


def select(
    variables: trees.Tree, config: named.Configs | Table, name: str
) -> tuple[dict[str, Any], RandLoraConfig]:
    """One of several adapters, as if it were the only one: for `split`, `save_adapter`, `summary`.

    Example:
      >>> variables = {"params": {}, "randlora": {"a": {"x": 1}, "b": {"x": 2}}}
      >>> configs = {"a": RandLoraConfig(), "b": RandLoraConfig(randlora_alpha=32)}
      >>> one, config = select(variables, configs, "b")
      >>> one["randlora"], config.randlora_alpha
      ({'x': 2}, 32)
    """
    if isinstance(config, Table):
        return tables.select(variables, config, name)
    return named.select(variables, config, name)


@overload
def insert(
    variables: trees.Tree, config: Table, name: str, added: trees.Tree, added_config: RandLoraConfig
) -> tuple[dict[str, Any], Table]: ...
@overload
def insert(
    variables: trees.Tree,
    config: Mapping[str, RandLoraConfig],
    name: str,
    added: trees.Tree,
    added_config: RandLoraConfig,
) -> tuple[dict[str, Any], dict[str, RandLoraConfig]]: ...
def insert(
    variables: trees.Tree,
    config: Any,
    name: str,
    added: trees.Tree,
    added_config: RandLoraConfig,
) -> tuple[dict[str, Any], Any]:
    """Adds an adapter, as `adapt` or `load_adapter` returned it, to others by name.

    No adapter that is there changes. Of several trees nothing is copied, and bases become larger
    where the new one needs it; into a table its scales are written, and shapes stay as they are.
    `delete` takes an adapter away again.

    Args:
      variables: of the others, or of a table.
      config: their configs by name, or the table.
      name, added, added_config: the new adapter's.

    Raises:
      ValueError: if the name is taken, if the two can't be on the same bases, or if the table is
        full or has no place for one of its layers.
    """
    if isinstance(config, Table):
        return tables.insert(variables, config, name, added, added_config)
    return named.insert(variables, config, name, added, added_config)


@overload
def delete(variables: trees.Tree, config: Table, name: str) -> tuple[dict[str, Any], Table]: ...
@overload
def delete(
    variables: trees.Tree, config: Mapping[str, RandLoraConfig], name: str
) -> tuple[dict[str, Any], dict[str, RandLoraConfig]]: ...
def delete(variables: trees.Tree, config: Any, name: str) -> tuple[dict[str, Any], Any]:
    """Takes one of several adapters away, or its entry out of a table; bases stay as they are.

    Raises:
      ValueError: if there is no such adapter, or, unless it is in a table, no other one.

    Example:
      >>> variables = {"params": {}, "randlora": {"a": {"x": 1}, "b": {"x": 2}}}
      >>> configs = {"a": RandLoraConfig(), "b": RandLoraConfig()}
      >>> variables, configs = delete(variables, configs, "a")
      >>> variables["randlora"], list(configs)
      ({'b': {'x': 2}}, ['b'])
    """
    if isinstance(config, Table):
        return tables.delete(variables, config, name)
    return named.delete(variables, config, name)


def with_strength(
    variables: trees.Tree,
    config: named.Configs | Table,
    strength: Strength | Mapping[str, Strength],
) -> dict[str, Any]:
    """Variables whose updates are multiplied by numbers, which may be traced: no recompilation.

    An update is linear in its lambdas, of which these are other ones, or others to multiply them
    with in a table; the given stay as they are, and are what to save.

    Args:
      variables: as `adapt` returned them.
      config: the adapter's, those of several by name, or a table.
      strength: a number; of several adapters, numbers by name for those that change.

    Raises:
      ValueError: for a name that is none of the adapters', and for what is no number.

    Example:
      >>> import jax.numpy as jnp
      >>> variables = {"params": {}, "randlora": {"a": {"randlora_lambda": jnp.ones(2)}}}
      >>> weaker = with_strength(variables, {"a": RandLoraConfig()}, {"a": 0.5})
      >>> weaker["randlora"]["a"]["randlora_lambda"].tolist()
      [0.5, 0.5]
    """
    if isinstance(config, Table):
        return tables.with_strength(variables, config, strength)
    return named.with_strength(variables, config, strength)
