"""What "all-linear" leaves out, although it may be a kernel: told by `summary` and in a warning."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

from randlora_jax import targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.registry import is_no_linear_layer
from randlora_jax.sites import Shape, Site
from randlora_jax.targets import Selection

Left = dict[trees.Path, Shape]  # parameters' paths, and their shapes in one layer


def left_out(
    shapes: Mapping[trees.Path, Shape], sites: Sequence[Site], config: RandLoraConfig
) -> Left:
    """The parameters with two axes or more that "all-linear" might have meant, and did not take.

    Args:
      shapes: of the base's parameters, by path.
      sites: what is adapted.
      config: names what is left out on purpose, by module or by the parameter's own path.
    """
    if not config.all_linear:
        return {}
    adapted, found = {site.kernel_path for site in sites}, {}
    for path, shape in shapes.items():
        if path in adapted or path[-1] == "bias":
            continue
        layer = _shape_in_layer(path, shape, sites)
        chosen = targets.selection(config, trees.dotted(path[:-1]))
        meant = chosen is Selection.YES or (chosen is Selection.BY_LAYER and layer != shape)
        if meant and targets.matches(config, trees.dotted(path)) and sum(s > 1 for s in layer) > 1:
            found[path] = layer
    return found


def described(left: Left) -> list[str]:
    """A line for each parameter, and one for all that differ by a number: "layers_*.w (4, 8)"."""
    alike: dict[tuple[str, Shape], list[str]] = {}
    for path, shape in left.items():
        name = trees.dotted(path)
        alike.setdefault((re.sub(r"\d+", "*", name), shape), []).append(name)
    return [
        f"{names[0]} {shape}" if len(names) == 1 else f"{pattern} {shape}, {len(names)} of them"
        for (pattern, shape), names in alike.items()
    ]


def warn_of_left_out(
    shapes: Mapping[trees.Path, Shape],
    sites: Mapping[str, Sequence[Site]],
    configs: Mapping[str, RandLoraConfig],
    modules: Mapping[str, type],
) -> None:
    """One warning of what "all-linear" leaves out, and how to adapt it.

    Args:
      shapes: of the base's parameters, by path.
      sites: of each adapter.
      configs: the adapters'.
      modules: the classes of the modules that were seen, by their dotted paths.
    """
    config = next((config for config in configs.values() if config.all_linear), None)
    if config is None:
        return
    owners: dict[trees.Path, str | None] = {}
    left: Left = {}
    everything = [site for own in sites.values() for site in own]
    for path, shape in left_out(shapes, everything, config).items():
        names = (trees.dotted(path[:i]) for i in range(len(path) - 1, -1, -1))
        owner = next((name for name in names if name in modules), None)
        if owner is None or not is_no_linear_layer(modules[owner]):
            left[path], owners[path] = shape, owner
    if not left:
        return
    lines = described(left)
    shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
    # Only what holds no other module can be a layer, and have a class to register.
    layers = (
        f"randlora_jax.register_layer({modules[owner].__name__}, kernel={path[-1]!r}) or "
        for path, owner in owners.items()
        if owner is not None and not any(targets.is_within(name, owner) for name in modules)
    )
    warnings.warn(
        f"target_modules='all-linear' leaves out: {shown}. If they are kernels, adapt them by "
        f"{next(layers, '')}their paths and input axes, "
        f"parameters={{{trees.dotted(next(iter(left)))!r}: (0,)}}; if not, their names in "
        "exclude_modules end this warning",
        stacklevel=4,
    )


def _shape_in_layer(path: trees.Path, shape: Shape, sites: Iterable[Site]) -> Shape:
    """A parameter's shape without the axes of a stack, if it is within one that is adapted."""
    for site in sites:
        if site.stack.axes and site.module[:1] == path[:1]:
            try:
                layer, sizes = site.stack.split(shape)
            except IndexError:
                continue
            if sizes == site.stack.sizes:
                return layer
    return shape
