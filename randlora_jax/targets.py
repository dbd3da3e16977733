"""Which modules an adapter acts on: by our rules over dotted paths, and by PEFT's."""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Container, Iterable, Mapping, Sequence

from randlora_jax.config import RandLoraConfig
from randlora_jax.known_layers import is_bridge


class Selection(enum.Enum):
    """Whether a config means a module."""

    NO = "no"
    YES = "yes"
    BY_LAYER = "some layers"  # if it is a stack of layers, those of `layers_to_transform`


def selection(config: RandLoraConfig, name: str) -> Selection:
    """Whether the config means the module: `matches`, and in one of `layers_to_transform`.

    Example:
      >>> config = RandLoraConfig(target_modules=["up"], layers_to_transform=[1, 3])
      >>> [selection(config, name).name for name in ("layers_1.up", "layers.2.up", "layers.up")]
      ['YES', 'NO', 'BY_LAYER']
    """
    if not matches(config, name):
        return Selection.NO
    by_layer = _selection_of_layer(config, name)
    by_name = not isinstance(config.target_modules, str) and name in (config.target_modules or ())
    # A whole name says which layer it means, as in PEFT, unless it is that of a stack of them.
    if by_name and (by_layer is Selection.NO or "." not in name):
        return Selection.YES
    return by_layer


def matches(config: RandLoraConfig, name: str) -> bool:
    """Whether `target_modules` (less `exclude_modules` and `modules_to_save`) means this module.

    A list matches whole paths or suffixes at a dot, a string is a regular expression for the whole
    path, "all-linear" matches all; layers are not counted here.

    Example:
      >>> matches(RandLoraConfig(target_modules=["q_proj"]), "layers.attn.q_proj")
      True
      >>> matches(RandLoraConfig(target_modules=r".*attn"), "layers.attn.q_proj")
      False
    """
    if is_saved_whole(config, name):
        return False
    if config.exclude_modules is not None and names_module(config.exclude_modules, name):
        return False
    return config.all_linear or names_module(config.target_modules or (), name)


def peft_matches(config: RandLoraConfig, name: str) -> bool:
    """Whether PEFT takes the module for a target: as `selection`, but for its count of layers.

    A number in PEFT's names is a part of its own, "layers.3.mlp", and nothing is stacked.
    """
    targets = config.target_modules or ()
    if is_saved_whole(config, name) or not names_module(targets, name):
        return False
    if config.layers_to_transform is None or isinstance(targets, str) or name in targets:
        return True
    if config.layers_pattern:
        patterns = _several(config.layers_pattern)
        found = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns)
        number = next((f for f in found if f), None)
    else:
        number = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return number is not None and int(number[1]) in layer_indices(config)


def is_saved_whole(config: RandLoraConfig, name: str) -> bool:
    """Whether the module is, or is within, one of `modules_to_save`."""
    parts = config.modules_to_save or ()
    return any(re.fullmatch(rf"(.*\.)?{re.escape(part)}(\..*)?", name) for part in parts)


def names_module(patterns: Iterable[str] | str, name: str) -> bool:
    """Whether a regular expression means the whole path, or a list has it or a suffix of it."""
    if isinstance(patterns, str):
        return patterns == name or re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)


def is_within(name: str, outer: str) -> bool:
    """Whether a module is a part of another one; all are parts of the root, ""."""
    return name != outer and (not outer or name.startswith(outer + "."))


def layer_indices(config: RandLoraConfig) -> tuple[int, ...]:
    """`layers_to_transform` in rising order."""
    layers = config.layers_to_transform
    return (layers,) if isinstance(layers, int) else tuple(sorted(set(layers or ())))


def _selection_of_layer(config: RandLoraConfig, name: str) -> Selection:
    """What `layers_to_transform` says of a module.

    The number is a path's own part or the end of one: "layers.3.mlp" and "layers_3.mlp". Without
    one, the module may be one of a stack, which has a leading axis for the layers instead.
    """
    if config.layers_to_transform is None:
        return Selection.YES
    patterns = _several(config.layers_pattern or r"[^.]+?")
    for pattern in patterns:
        found = re.match(rf"(?:.*?\.)??{pattern}[._](\d+)\.", name)
        if found:
            return Selection.YES if int(found[1]) in layer_indices(config) else Selection.NO
    if config.layers_pattern is None or any(p in name.split(".") for p in patterns):
        return Selection.BY_LAYER
    return Selection.NO


def _several(names: Iterable[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def check(
    config: RandLoraConfig,
    modules: Mapping[str, tuple[type, bool]],
    others: Iterable[str] = (),
    idle: Iterable[str] = (),
    parameters: Iterable[str] = (),
    raw: Container[str] = (),
) -> None:
    """Raises a ValueError for a name that matches nothing, and for a target that is not linear.

    Args:
      modules: for each path, the module's type and whether it can be adapted.
      others: paths of modules that have parameters, and were not seen to run.
      idle: paths of modules that may have none, and need not run: they can only be excluded.
      raw: those of `modules` that are parameters, asked for by their paths.
      parameters: paths of those that nothing adapts, and that have two axes: they can be excluded.
    """
    parameters = list(parameters)
    linear = [name for name, (_, is_linear) in modules.items() if is_linear]
    bridge = next((cls for cls, _ in modules.values() if is_bridge(cls)), None)
    if not linear and bridge is not None:
        raise ValueError(f"the model has no linear layer of its own: {within_bridge(bridge)}")
    if config.target_modules is None:
        raise ValueError(
            "target_modules is None: name the modules to adapt, for example 'all-linear' or some "
            f"of {_some(sorted({name.rsplit('.', 1)[-1] for name in linear}))}"
        )
    matched = [name for name in modules if matches(config, name)]
    if not config.all_linear:
        for name in matched:
            if name not in linear:
                cls = modules[name][0].__name__
                within = [other for other in linear if is_within(other, name)]
                cure = "narrow it, or give its name to exclude_modules"
                if within:
                    cure = f"name some of {_some(within)}, or give its name to exclude_modules"
                elif not any(is_within(other, name) for other in modules):
                    cure += f"; if it is one, call randlora_jax.register_layer({cls}, kernel=...)"
                raise ValueError(
                    f"target_modules={config.target_modules!r} matches {name!r}, which is a {cls} "
                    f"and not a known linear layer: {cure}"
                )
    for name in () if isinstance(config.target_modules, str) else config.target_modules or ():
        if any(names_module((name,), module) for module in modules):
            continue
        held = [module for module in linear if names_module((name,), f"{module}.kernel")]
        if held and "." in name:
            raise ValueError(
                f"target_modules: {name!r} is the kernel of {held[0]!r}: give that name"
            )
        meant = next((p for p in parameters if names_module((name,), p)), None)
        if meant is not None:
            raise ValueError(
                f"target_modules: {name!r} is no module but the parameter {meant!r}: adapt it by "
                f"parameters={{{meant!r}: (...)}}, with those of its axes that are inputs"
            )
    _check_names(config, "target_modules", modules, linear)
    everything = list(dict.fromkeys([*modules, *others]))
    excludable = [name for name in everything if name not in raw]
    _check_names(config, "exclude_modules", [*excludable, *idle, *parameters], excludable)
    for field in ("modules_to_save", "layers_pattern"):
        _check_names(config, field, everything, everything)
    if not any(selection(config, n) is not Selection.NO for n in matched if n in linear):
        raise ValueError(
            f"target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r}, modules_to_save={config.modules_to_save!r} and "
            f"layers_to_transform={config.layers_to_transform!r} leaves no linear layer of "
            f"{_some(linear)}"
        )


def within_bridge(cls: type) -> str:
    """What to do with a model that is within one of Flax's other kind, for messages."""
    return f"adapt the module within the {cls.__name__}, by RandLora or inject"


# PEFT's own names for the heads of these tasks: it takes those of them that there are.
HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _check_names(
    config: RandLoraConfig, field: str, modules: Iterable[str], near: Sequence[str]
) -> None:
    """Raises a ValueError for a name, in a field of the config, that matches no module."""
    names = getattr(config, field)
    if names is None or (field == "target_modules" and config.all_linear):
        return
    for name in _several(names):
        if field == "modules_to_save":
            found = any(is_saved_whole(config.replace(modules_to_save=[name]), m) for m in modules)
            found = found or name in HEADS.get(config.task_type or "", ())
        elif field == "layers_pattern":
            found = any(re.search(rf"(?:^|\.)(?:{name})(?:[._]|$)", m) for m in modules)
        else:
            # What is excluded on purpose still counts as a meaning.
            pattern = name if isinstance(names, str) else (name,)
            found = any(names_module(pattern, m) for m in modules)
        if not found:
            raise ValueError(
                f"{field}: {name!r} matches no module; the nearest are {nearest(name, near)}"
            )


def nearest(target: str, names: Sequence[str]) -> str:
    """The names that are most like one that is none of them, for messages."""
    # A path is near if it is as a whole, or if its last part is: people type "qproj" for "q_proj".
    by_key: dict[str, str] = {}
    for name in names:
        for key in (name, name.rsplit(".", 1)[-1]):
            by_key.setdefault(key, name)
    near = difflib.get_close_matches(target, by_key, n=5, cutoff=0.5)
    return _some(list(dict.fromkeys(by_key[key] for key in near)) or names)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none at all"
