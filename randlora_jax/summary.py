"""What is adapted, what trains and what it costs, as a table of text."""

from __future__ import annotations

import collections
import math

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from randlora_jax import bases as bases_lib
from randlora_jax import trees
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.left_out import described, left_out
from randlora_jax.ops.costs import Strategy, cheapest, product_flops
from randlora_jax.quantised import is_quantised, type_of
from randlora_jax.sites import Kernel
from randlora_jax.stored import sites_of
from randlora_jax.tables import readable, table_of
from randlora_jax.training import split


def summary(
    variables: trees.Tree,
    config: RandLoraConfig,
    *,
    tokens: int | None = None,
    strategy: Strategy = "auto",
    shardings: trees.Tree | None = None,
) -> str:
    """A table of the adapted layers, the parameters that train, and the bytes of a checkpoint.

    Under "not adapted" are the parameters with two axes or more that "all-linear" does not take,
    embeddings among them; what `exclude_modules` and `modules_to_save` name is not listed.

    Args:
      variables: as `adapt` returned them; `jax.ShapeDtypeStruct`s will do.
      config: the adapter's.
      tokens: how many one device sees in a step; of experts, each of them. With it the table says
        of each layer which way its update is computed, forward and backward, and the step's
        operations over those of the frozen layer.
      strategy: as it is given to the model.
      shardings: as `randlora_jax.sharding` gives them, by default those of the arrays. On several
        devices the table says what each of them holds.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from randlora_jax.linen import RandLora
      >>> config = RandLoraConfig(r=2, target_modules="all-linear")
      >>> model = RandLora(nn.Dense(4), config)
      >>> print(summary(model.init(jax.random.key(0), jnp.ones((1, 6))), config))
      layer   kernel  lambda  gamma   trains
      (root)  (6, 4)  (2, 2)  (2, 4)      12
      <BLANKLINE>
      trainable parameters  12 of 40 (30.00 %)
      bases                 128 B, one pair for all layers
      checkpoint            176 B
      >>> shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 6)))
      >>> print(summary(shapes, config, tokens=1000).split("\\n\\n")[0])
      layer   kernel  lambda  gamma   trains  forward  backward  over frozen
      (root)  (6, 4)  (2, 2)  (2, 4)      12  merged   merged           1.51
    """
    check_variables(variables, "params", "randlora", "randlora_bases")
    check_config(config)
    rows: list[list[str]] = []
    sites = sites_of(variables, config, guess=True)
    for site in sites:
        kernel = trees.get(variables["params"], site.kernel_path)
        arrays = (kernel, *site.scales(variables["randlora"]))
        shapes = [trees.unboxed(array).shape for array in arrays]
        count = sum(math.prod(shape) for shape in shapes[1:])
        cost = _cost(site.kernel, config.r, tokens, strategy) if tokens else ()
        name = trees.dotted(site.path) or "(root)"
        rows.append([name, *map(str, shapes), f"{count:,}", *cost])
    trainable, _ = split(variables, config)
    trains = _count(trainable)
    total = trains + _count(variables["params"]) - _count(trainable.get("params", {}))
    held = bases_lib.nbytes(variables["randlora_bases"])
    leaves = {path: trees.unboxed(leaf) for path, leaf in trees.items(trainable)}
    saved = bases_lib.nbytes(leaves) + held * config.save_projection
    facts = [
        ("trainable parameters", f"{trains:,} of {total:,} ({100 * trains / total:.2f} %)"),
        *_of_base(variables["params"]),
        ("bases", f"{readable(held)}, one pair for all layers"),
        ("checkpoint", readable(saved) + ("" if config.save_projection else ", without the bases")),
    ]
    facts += _on_each_device(variables, shardings or {})
    params = {path: trees.unboxed(leaf).shape for path, leaf in trees.items(variables["params"])}
    for line in described(left_out(params, sites, config)):
        facts.append(("" if facts[-1][0] in ("", "not adapted") else "not adapted", line))
    head = ["layer", "kernel", "lambda", "gamma", "trains"]
    head += ["forward", "backward", "over frozen"] if tokens else []
    lines = table_of([head, *rows], right=(4, 7))
    return "\n".join([*lines, "", *table_of(facts)])


def _cost(kernel: Kernel, r: int, tokens: int, strategy: Strategy) -> tuple[str, ...]:
    """(way forward, way backward, operations over those of the frozen layer)."""
    _, n = kernel.scale_shapes(r)[0][-2:]
    ways = cheapest(tokens, *kernel.features, (r, n), strategy)
    frozen = 4 * tokens * math.prod(kernel.features)
    over = sum(product_flops(tokens, *kernel.features, r * n, *ways)) / frozen
    return *ways, f"{over:.2f}"


def _of_base(params: trees.Tree) -> list[tuple[str, str]]:
    """What a quantised base takes, and what it saves."""
    leaves = [trees.unboxed(leaf) for _, leaf in trees.items(params)]
    quantised = [leaf for leaf in leaves if is_quantised(leaf)]
    if not quantised:
        return []
    size = lambda leaf: sum(bases_lib.nbytes({0: part}) for part in jax.tree.leaves(leaf))
    floats = (math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in quantised)
    saved = sum(floats) - sum(map(size, quantised))
    kinds = collections.Counter(type_of(leaf).partition(",")[0] for leaf in quantised)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    total = readable(sum(map(size, leaves)))
    return [("base", f"{total}, {readable(saved)} less by quantised kernels ({listed})")]


def _on_each_device(variables: trees.Tree, shardings: trees.Tree) -> list[tuple[str, str]]:
    """What one device holds of the base, the scales and the bases, if there are several."""
    given, several = dict(trees.items(shardings)), 1
    held: dict[str, int] = {"params": 0, "randlora": 0, "randlora_bases": 0}
    for path, leaf in trees.items({name: variables[name] for name in held}):
        arrays, placed = jax.tree.leaves(trees.unboxed(leaf)), jax.tree.leaves(given.get(path))
        for array, where in zip(arrays, placed or [None] * len(arrays), strict=True):
            where, shape = where or getattr(array, "sharding", None), array.shape
            if isinstance(where, Sharding):
                several, shape = max(several, where.num_devices), where.shard_shape(shape)
            held[path[0]] += bases_lib.nbytes({path: jax.ShapeDtypeStruct(shape, array.dtype)})
    parts = zip(("base", "scales", "bases"), map(readable, held.values()), strict=True)
    text = ", ".join(f"{what} {size}" for what, size in parts)
    return [(f"on each of {several}", text)] if several > 1 else []


def _count(tree: trees.Tree) -> int:
    return sum(math.prod(trees.unboxed(leaf).shape) for _, leaf in trees.items(tree))
