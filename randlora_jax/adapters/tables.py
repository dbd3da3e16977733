"""A table of adapters, whose scales are stacked in a number of slots, for batches that mix them.

Entries come and go in arrays whose shapes stay, so nothing that was compiled is compiled again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from randlora_jax import trees
from randlora_jax.adapters import named
from randlora_jax.bases import SCALING, joined, without_table
from randlora_jax.checks import check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.placement import beside, placed_like
from randlora_jax.sites import SCALES, Site
from randlora_jax.stacks import part_of_stack
from randlora_jax.stored import sites_of

BASE = "__base__"  # PEFT's name for no adapter, in its `adapter_names`


@dataclasses.dataclass(frozen=True)
class Entry:
    """One adapter of a table: its slot, its config, and the paths of its scales."""

    slot: int
    config: RandLoraConfig
    paths: frozenset[trees.Path]


@dataclasses.dataclass(frozen=True)
class Table:
    """What a table holds, by name; its arrays are in the variables. `rl.adapters.table` makes it.

    Attributes:
      config: for the model: `RandLora(base, table.config)` or `inject(model, table.config, ...)`.
        It stays as it is, whatever comes and goes.
      capacity: how many adapters there can be.
      entries: those that are there.
      sites: the kernels that the table has scales for.
    """

    config: RandLoraConfig
    capacity: int
    entries: Mapping[str, Entry]
    sites: tuple[Site, ...] = dataclasses.field(repr=False)

    def ids(self, names: str | Sequence[str]) -> jax.Array:
        """The numbers for `adapter_ids` of adapters by name, one for each row of a batch.

        Args:
          names: of adapters; "__base__" is the model without one.

        Returns:
          int32 (len(names),), or () for one name.

        Raises:
          ValueError: for a name that is not in the table.
        """
        listed = [names] if isinstance(names, str) else list(names)
        unknown = sorted({n for n in listed if n != BASE and n not in self.entries})
        if unknown:
            raise ValueError(f"names has {unknown}, and the table {[*sorted(self.entries), BASE]}")
        ids = [-1 if name == BASE else self.entries[name].slot for name in listed]
        return jnp.asarray(ids[0] if isinstance(names, str) else ids, jnp.int32)


def table(
    variables: trees.Tree,
    configs: Mapping[str, RandLoraConfig],
    *,
    capacity: int,
    randlora_dropout: float = 0.0,
) -> tuple[dict[str, Any], Table]:
    """Puts adapters by name into a table, so that one batch can use several: see `adapter_ids`.

    `insert` and `delete` then put others in and take some out, without a new compilation, and
    `select` gives one as if it were alone, for `save_adapter`, `merge` and the rest. All that
    `configs` may differ in, they may: alpha, layers, layers of stacks.

    Args:
      variables: of the adapters, as `adapt` returned them or `insert` made them.
      configs: theirs by name.
      capacity: how many adapters the table can hold. Its kernels are those of the adapters that it
        starts with: one that adapts all of them makes a place for every later one.
      randlora_dropout: the rate at which all of the table trains; those of the configs are for
        training alone.

    Returns:
      Variables with "randlora" of one tree, lambda (capacity, r, n) and gamma
      (capacity, n, min(in, out)), behind the axes of a stack of layers; "randlora_bases" has
      `randlora_scaling` (capacity,) besides, alpha / r of each adapter. And the table.

    Raises:
      ValueError: where the adapters can't share their bases, or are more than the capacity.

    Example:
      >>> import flax.linen as nn
      >>> from randlora_jax.linen import RandLora
      >>> chat = RandLoraConfig(r=2, target_modules="all-linear")
      >>> configs = {"chat": chat, "code": chat.replace(randlora_alpha=8)}
      >>> x = jnp.ones((3, 4))
      >>> variables = RandLora(nn.Dense(3), configs).init(jax.random.key(0), x)
      >>> variables, known = table(variables, configs, capacity=8)
      >>> jax.tree.map(jnp.shape, variables["randlora"])
      {'randlora_gamma': (8, 2, 3), 'randlora_lambda': (8, 2, 2)}
      >>> ids = known.ids(["code", "__base__", "chat"])
      >>> RandLora(nn.Dense(3), known.config).apply(variables, x, adapter_ids=ids).shape
      (3, 3)
    """
    check_variables(variables, "params", "randlora", "randlora_bases")
    if not isinstance(configs, Mapping):
        raise TypeError("configs must name the adapters: {'chat': config}, as must 'randlora'")
    named.check(configs)
    _check_trains_alone(configs)
    if BASE in configs:
        raise ValueError(f"configs names an adapter {BASE!r}, which means the model without one")
    if capacity < len(configs):
        raise ValueError(f"capacity={capacity} is too small for {len(configs)} adapters")
    found = {name: _sites(variables, named.scales_of(variables, name), configs[name])
             for name in configs}  # fmt: skip
    sites = {site.path: _whole(site) for own in found.values() for site in own.values()}
    first = next(iter(configs.values()))
    paths = dict.fromkeys(trees.dotted(site.module) for site in sites.values())
    exactly = "|".join(map(re.escape, paths)) if all(paths) else "all-linear"
    config = first.replace(
        target_modules=exactly,
        exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        randlora_dropout=randlora_dropout,
    )  # fmt: skip
    leaves: dict[trees.Path, Any] = {}
    for name, own in found.items():
        for site in own.values():
            pair = site.scales(named.scales_of(variables, name))
            for scale, leaf in zip(SCALES, pair, strict=True):
                leaves.setdefault((*site.path, scale), _empty(sites[site.path], leaf, capacity))
    bases = dict(variables["randlora_bases"])
    bases[SCALING] = beside(bases["randlora_A"], jnp.zeros(capacity, jnp.float32))
    made = {**variables, "randlora": trees.build(leaves), "randlora_bases": bases}
    known = Table(config, capacity, {}, tuple(sites.values()))
    for name in configs:
        one = {"randlora": named.scales_of(variables, name), "randlora_bases": bases}
        made, known = insert(made, known, name, one, configs[name])
    return made, known


def insert(
    variables: trees.Tree, table: Table, name: str, added: trees.Tree, config: RandLoraConfig
) -> tuple[dict[str, Any], Table]:
    """`rl.adapters.insert`, into a free slot of a table."""
    check_variables(added, "randlora", "randlora_bases")
    configs = {n: entry.config for n, entry in table.entries.items()}
    if name in configs or name == BASE:
        raise ValueError(f"there is an adapter {name!r} already: {[*sorted(configs), BASE]}")
    own = table.config.replace(randlora_alpha=config.randlora_alpha)
    named.check({"the table's": own, **configs, name: config})
    _check_trains_alone({name: config})
    taken = {entry.slot for entry in table.entries.values()}
    if len(taken) == table.capacity:
        raise ValueError(
            f"the table's capacity={table.capacity} slots are taken, by {sorted(configs)}: delete "
            "one, or make a larger table"
        )
    ours, given = (without_table(v["randlora_bases"]) for v in (variables, added))
    try:
        joined(config, ours, given)
    except ValueError as error:
        raise ValueError(f"{name!r} can't be in the table: {error}") from None
    slot = min(set(range(table.capacity)) - taken)
    found, places = _sites(variables, added["randlora"], config), {s.path: s for s in table.sites}
    for path in found:
        if path not in places:
            raise ValueError(
                f"{name!r} adapts {trees.shown(path)}, for which the table has no place: make the "
                "table with an adapter of all layers that later ones can have"
            )
    leaves = dict(trees.items(variables["randlora"]))
    for path, site in found.items():
        for scale, leaf in zip(SCALES, site.scales(added["randlora"]), strict=True):
            one = site.stack.spread(trees.unboxed(leaf))
            leaves[(*path, scale)] = _set(places[path], leaves[(*path, scale)], slot, one)
    return _with(variables, leaves, slot, config.scaling), dataclasses.replace(
        table, entries={**table.entries, name: Entry(slot, config, frozenset(found))}
    )


def delete(variables: trees.Tree, table: Table, name: str) -> tuple[dict[str, Any], Table]:
    """`rl.adapters.delete`, from a table: its slot is empty, and computes the base."""
    entry, leaves = _entry(table, name), dict(trees.items(variables["randlora"]))
    for site in table.sites:
        for scale in SCALES if site.path in entry.paths else ():
            path = (*site.path, scale)
            leaves[path] = _set(site, leaves[path], entry.slot, 0)
    left = {n: other for n, other in table.entries.items() if n != name}
    return _with(variables, leaves, entry.slot, 0.0), dataclasses.replace(table, entries=left)


def select(variables: trees.Tree, table: Table, name: str) -> tuple[dict[str, Any], RandLoraConfig]:
    """`rl.adapters.select`, of a table."""
    entry, leaves = _entry(table, name), {}
    for site in table.sites:
        for scale in SCALES if site.path in entry.paths else ():
            leaf = trees.get(variables["randlora"], (*site.path, scale))
            one = site.stack.over(lambda whole: whole[entry.slot])(trees.unboxed(leaf))
            part = part_of_stack(entry.config, site.module, site.stored_shape).adapted_part(one)
            leaves[(*site.path, scale)] = _boxed(leaf, part, site, table=False)
    bases = without_table(variables["randlora_bases"])
    return {**variables, "randlora": trees.build(leaves), "randlora_bases": bases}, entry.config


def with_strength(variables: trees.Tree, table: Table, strength: Any) -> dict[str, Any]:
    """`rl.adapters.with_strength`, of a table."""
    configs = {name: entry.config for name, entry in table.entries.items()}
    bases = dict(variables["randlora_bases"])
    for name, number in named.strengths(configs, strength).items():
        bases[SCALING] = bases[SCALING].at[table.entries[name].slot].multiply(number)
    return {**variables, "randlora_bases": bases}


def _entry(table: Table, name: str) -> Entry:
    if name not in table.entries:
        raise ValueError(f"there is no adapter {name!r}: the table has {sorted(table.entries)}")
    return table.entries[name]


def _check_trains_alone(configs: Mapping[str, RandLoraConfig]) -> None:
    more = [n for n, c in configs.items() if c.bias != "none" or c.modules_to_save]
    if more:
        raise ValueError(
            f"{more} train biases or modules_to_save, which a table's adapters would share: set "
            "bias='none' and modules_to_save=None"
        )


def _sites(
    variables: trees.Tree, scales: trees.Tree, config: RandLoraConfig
) -> dict[trees.Path, Site]:
    bases = without_table(variables["randlora_bases"])
    given = {"params": variables["params"], "randlora": scales, "randlora_bases": bases}
    return {site.path: site for site in sites_of(given, config, guess=True)}


def _whole(site: Site) -> Site:
    """The site with a place for all layers of its stack."""
    return dataclasses.replace(site, stack=dataclasses.replace(site.stack, layers=None))


def _empty(site: Site, leaf: Any, capacity: int) -> Any:
    """A table's leaf without entries, from such a leaf of one adapter."""
    one = site.stack.spread(trees.unboxed(leaf))
    make = lambda layer: jnp.zeros((capacity, *layer.shape), layer.dtype)
    return _boxed(leaf, beside(one, site.stack.over(make)(one)), site, table=True)


def _set(site: Site, leaf: Any, slot: int, one: Any) -> Any:
    """A table's leaf with another entry, where it was."""
    value = trees.unboxed(leaf)
    one = beside(value, jnp.asarray(one, value.dtype))
    put = lambda whole, entry: whole.at[slot].set(entry)
    if one.ndim:
        new = site.stack.over(put)(value, one)
    else:
        new = site.stack.over(lambda whole: put(whole, one))(value)
    return trees.replaced(leaf, placed_like(value, new))


def _boxed(leaf: Any, value: Any, site: Site, *, table: bool) -> Any:
    """A value in a box like the leaf's, whose names have a table's axis more, or less."""
    if not isinstance(leaf, nn.Partitioned):
        return trees.replaced(leaf, value)
    layer, stack = site.stack.split(leaf.names)
    layer = (None, *layer) if table else layer[1:]
    return leaf.replace(value=value, names=site.stack.join(layer, stack))


def _with(variables: trees.Tree, leaves: dict, slot: int, scaling: float) -> dict[str, Any]:
    bases = dict(variables["randlora_bases"])
    bases[SCALING] = placed_like(bases[SCALING], bases[SCALING].at[slot].set(scaling))
    return {**variables, "randlora": trees.build(leaves), "randlora_bases": bases}
