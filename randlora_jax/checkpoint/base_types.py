"""On what kind of base an adapter was trained: of floats, or quantised, and how."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from randlora_jax import trees
from randlora_jax.quantised import is_quantised, type_of
from randlora_jax.sites import parse_label
from randlora_jax.stored import scale_pairs

FLOATS = "floats"


def base_types(variables: trees.Tree) -> dict[str, str]:
    """What each adapted kernel that is quantised is made of, by its dotted path.

    Args:
      variables: with "params" and the "randlora" of one adapter.
    """
    params = dict(trees.items(variables["params"]))
    paths = {parse_label(path, params)[0] for path, _ in scale_pairs(variables["randlora"])}
    found = {trees.dotted(path): params[path] for path in sorted(paths & set(params))}
    return {name: type_of(leaf) for name, leaf in found.items() if is_quantised(leaf)}


def tell_of_another_base(
    trained: Mapping[str, str], now: Mapping[str, str], stacklevel: int
) -> None:
    """Warns where an adapter gets on a base whose kernels are of another type than in training.

    Args:
      trained, now: as `base_types` gives them.
    """
    names = sorted({*trained, *now})
    there, here = ([types.get(name, FLOATS) for name in names] for types in (trained, now))
    differ = [trio for trio in zip(names, there, here, strict=True) if trio[1] != trio[2]]
    if differ:
        name, old, new = differ[0]
        warnings.warn(
            f"the adapter was trained on a base whose {name!r} is of {old}, and this one's is "
            f"of {new}; so it is with {len(differ)} kernels. Its update made up for the rounding "
            "of the old base: train on, or load it onto a base of that type",
            stacklevel=stacklevel + 1,
        )
