"""What "all-linear" leaves out, although it may be a kernel: told by `summary` and in a warning."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence

from randlora_jax import targets, trees
from randlora_jax.config import RandLoraConfig
from randlora_jax.known_layers import is_bridge
from randlora_jax.registry import is_no_linear_layer
from randlora_jax.sites import Shape, Site, Stack
from randlora_jax.targets import Selection

Shapes = Mapping[trees.Path, Shape]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was seen of a live model.

    Attributes:
      modules: the classes of modules by their dotted paths; in Linen of those that ran.
      shapes: of the base's parameters.
      in_layer: the same as one layer of a stack sees them, where that is known.
    """

    modules: Mapping[str, type]
    shapes: Shapes
    in_layer: Shapes = dataclasses.field(default_factory=dict)


def may_be_kernels(shapes: Shapes, adapted: Container[trees.Path]) -> list[trees.Path]:
    """The parameters that are not adapted, and have two axes or more."""
    return [p for p, shape in shapes.items() if p not in adapted and _is_matrix(p, shape)]


def left_out(
    shapes: Shapes, sites: Sequence[Site], config: RandLoraConfig, in_layer: Shapes | None = None
) -> dict[trees.Path, Shape]:
    """The parameters that "all-linear" might have meant, and did not take, as one layer sees them.

    Args:
      shapes: of the base's parameters, by path.
      sites: what is adapted.
      config: names what is left out on purpose, by module or by the parameter's own path.
      in_layer: as in `Seen`. Elsewhere what is beside the kernels of a stack is taken to be in it.
    """
    found: dict[trees.Path, Shape] = {}
    if not config.all_linear:
        return found
    adapted, stacks = {site.kernel_path for site in sites}, _stacks(sites)
    for path in may_be_kernels(shapes, adapted):
        shape = (in_layer or {}).get(path) or _in_layer(path, shapes[path], stacks)
        chosen = targets.selection(config, trees.dotted(path[:-1]))
        if chosen is Selection.BY_LAYER and len(shape) == len(shapes[path]):
            continue  # it is in no layer
        excluded = chosen is Selection.NO or not targets.matches(config, trees.dotted(path))
        if not excluded and _is_matrix(path, shape):
            found[path] = shape
    return found


def described(left: Mapping[trees.Path, Shape]) -> list[str]:
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
    seen: Seen,
    sites: Mapping[str, Sequence[Site]],
    configs: Mapping[str, RandLoraConfig],
    stacklevel: int,
) -> None:
    """One warning of what "all-linear" leaves out, and how to adapt it.

    Args:
      seen: the model.
      sites: of each adapter.
      configs: the adapters'. What any of them adapts is not left out.
      stacklevel: as for `warnings.warn`, where 1 is this function.
    """
    everything = [site for own in sites.values() for site in own]
    found: dict[trees.Path, Shape] = {}
    for config in configs.values():
        found |= left_out(seen.shapes, everything, config, seen.in_layer)
    owners = {path: _owner(path, seen.modules) for path in found}
    left = {
        path: shape
        for path, shape in found.items()
        if not ((owner := owners[path]) and is_no_linear_layer(seen.modules[owner]))
    }
    if not left:
        return
    lines = described(left)
    shown = "; ".join(lines[:8]) + (f"; and {len(lines) - 8} more" if len(lines) > 8 else "")
    cures: dict[str, str] = {}  # an example of each kind
    for path in left:
        kind, cure = _cure(path, owners[path], left, owners, seen.modules)
        cures.setdefault(kind, cure)
    warnings.warn(
        f"target_modules='all-linear' leaves out: {shown}. If they are kernels: "
        f"{'; '.join(cures.values())}. If not, their names in exclude_modules end this warning",
        stacklevel=stacklevel + 1,
    )


def _cure(
    path: trees.Path,
    owner: str | None,
    left: Mapping[trees.Path, Shape],
    owners: Mapping[trees.Path, str | None],
    modules: Mapping[str, type],
) -> tuple[str, str]:
    """What to write to adapt one parameter: (kind, text)."""
    not_run = "run", "give adapt inputs, or a method, that run their modules"
    if owner is None:
        return not_run
    cls = modules[owner]
    if is_bridge(cls):
        return "bridge", targets.within_bridge(cls)
    if owner != trees.dotted(path[:-1]):
        return not_run
    alone = [other for other in left if owners[other] == owner] == [path]
    if alone and not any(targets.is_within(name, owner) for name in modules):
        call = f"randlora_jax.register_layer({cls.__name__}, kernel={path[-1]!r})"
        return "register", call
    by_path = f"parameters={{{trees.dotted(path)!r}: (...)}}"
    return "path", f"{by_path}, with those of its axes that are inputs"


def _owner(path: trees.Path, modules: Mapping[str, type]) -> str | None:
    """The innermost module that holds a parameter, of those that were seen."""
    names = (trees.dotted(path[:i]) for i in range(len(path) - 1, -1, -1))
    return next((name for name in names if name in modules), None)


def _is_matrix(path: trees.Path, shape: Shape) -> bool:
    return path[-1] != "bias" and sum(size > 1 for size in shape) > 1


def _stacks(sites: Iterable[Site]) -> dict[Stack, trees.Path]:
    """The stacks that are adapted, and where each begins: above it are other kernels too."""
    by_stack: dict[Stack, list[trees.Path]] = {}
    for site in sites:
        stack = dataclasses.replace(site.stack, layers=None)
        by_stack.setdefault(stack, []).append(site.module)
    begins = {}
    for stack, modules in by_stack.items():
        others = [m for other, own in by_stack.items() if other != stack for m in own]
        first = min(modules)
        common = 0
        while common < len(first) and all(m[: common + 1] == first[: common + 1] for m in modules):
            common += 1
        clear = (i for i in range(common + 1) if not any(m[:i] == first[:i] for m in others))
        if stack.axes:
            begins[stack] = first[: next(clear, common)]
    return begins


def _in_layer(path: trees.Path, shape: Shape, stacks: Mapping[Stack, trees.Path]) -> Shape:
    """A parameter's shape without the axes of a stack, if it is within one that is adapted."""
    for stack, begin in stacks.items():
        if path[: len(begin)] != begin:
            continue
        for count in range(len(stack.axes), 0, -1):  # beside an inner stack, it is in the outer one
            part = Stack(stack.axes[:count], stack.sizes[:count])
            try:
                layer, sizes = part.split(shape)
            except IndexError:
                continue
            if sizes == part.sizes:
                return layer
    return shape
