"""Which modules an adapter acts on: PEFT's rules over dotted module paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from randlora_jax.config import RandLoraConfig


def name_of(path: Iterable[str]) -> str:
    """A module's path as PEFT writes it: joined by dots."""
    return ".".join(path)


def matches(config: RandLoraConfig, name: str) -> bool:
    """Whether `target_modules` (less `exclude_modules` and `modules_to_save`) means this module.

    A list matches whole paths or suffixes at a dot, a string is a regular expression for the whole
    path, "all-linear" matches all; layers are counted by `in_layers`.

    Example:
      >>> matches(RandLoraConfig(target_modules=["q_proj"]), "layers.attn.q_proj")
      True
      >>> matches(RandLoraConfig(target_modules=r".*attn"), "layers.attn.q_proj")
      False
    """
    if is_saved_whole(config, name):
        return False
    if config.exclude_modules is not None and hits(config.exclude_modules, name):
        return False
    return config.all_linear or hits(config.target_modules or (), name)


def is_saved_whole(config: RandLoraConfig, name: str) -> bool:
    """Whether the module is, or is within, one of `modules_to_save`."""
    parts = config.modules_to_save or ()
    return any(re.fullmatch(rf"(.*\.)?{re.escape(part)}(\..*)?", name) for part in parts)


def wanted(config: RandLoraConfig, name: str) -> bool | None:
    """`matches`, and in one of `layers_to_transform`; None if that is for a stack to decide.

    Example:
      >>> config = RandLoraConfig(target_modules=["up"], layers_to_transform=[1, 3])
      >>> [wanted(config, name) for name in ("layers_1.up", "layers.2.up", "layers.up")]
      [True, False, None]
    """
    if not matches(config, name):
        return False
    kept = in_layers(config, name)
    by_name = not isinstance(config.target_modules, str) and name in config.target_modules
    # A whole name says which layer it means, as in PEFT, unless it is that of a stack of them.
    return True if by_name and (kept is False or "." not in name) else kept


def in_layers(config: RandLoraConfig, name: str) -> bool | None:
    """Whether `layers_to_transform` keeps the module; None if its path has no layer number.

    The number is a path's own part or the end of one: "layers.3.mlp" and "layers_3.mlp". Without
    one, the module may be one of a stack, which has a leading axis for the layers instead.
    """
    if config.layers_to_transform is None:
        return True
    patterns = config.layers_pattern or (r"[^.]+?",)
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    for pattern in patterns:
        found = re.match(rf"(?:.*?\.)??{pattern}[._](\d+)\.", name)
        if found:
            return int(found[1]) in layer_indices(config)
    stack = config.layers_pattern is None or any(p in name.split(".") for p in patterns)
    return None if stack else False


def layer_indices(config: RandLoraConfig) -> tuple[int, ...]:
    """`layers_to_transform` in rising order."""
    layers = config.layers_to_transform
    return (layers,) if isinstance(layers, int) else tuple(sorted(set(layers or ())))


def check(config: RandLoraConfig, modules: Mapping[str, tuple[type, bool]]) -> None:
    """Raises a ValueError for a target that matches nothing, or nothing linear.

    Args:
      modules: for each path, the module's type and whether it can be adapted.
    """
    linear = [name for name, (_, is_linear) in modules.items() if is_linear]
    if config.target_modules is None:
        raise ValueError(
            "target_modules is None: name the modules to adapt, for example 'all-linear' or some "
            f"of {_some(sorted({name.rsplit('.', 1)[-1] for name in linear}))}"
        )
    matched = [name for name in modules if matches(config, name)]
    if not config.all_linear:
        for name in matched:
            if name not in linear:
                raise ValueError(
                    f"target_modules={config.target_modules!r} matches {name!r}, which is a "
                    f"{modules[name][0].__name__} and not a linear layer: narrow it, or give its "
                    "name to exclude_modules"
                )
        targets = config.target_modules
        for target in (targets,) if isinstance(targets, str) else targets:
            # Each must mean something; what is excluded on purpose still counts as a meaning.
            pattern = target if isinstance(targets, str) else (target,)
            if not any(hits(pattern, name) for name in modules):
                raise ValueError(
                    f"target_modules: {target!r} matches no module; the nearest are "
                    f"{_some(_nearest(target, linear) or linear)}"
                )
    if not any(wanted(config, name) is not False for name in matched if name in linear):
        raise ValueError(
            f"target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r}, modules_to_save={config.modules_to_save!r} and "
            f"layers_to_transform={config.layers_to_transform!r} leaves no linear layer of "
            f"{_some(linear)}"
        )


def hits(patterns: Iterable[str] | str, name: str) -> bool:
    """Whether a regular expression means a whole path, or a list one by path or suffix."""
    if isinstance(patterns, str):
        return patterns == name or re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith("." + p) for p in patterns)


def _nearest(target: str, names: Iterable[str]) -> list[str]:
    # A path is near if it is as a whole, or if its last part is: people type "qproj" for "q_proj".
    by_key = {}
    for name in names:
        for key in (name, name.rsplit(".", 1)[-1]):
            by_key.setdefault(key, name)
    near = difflib.get_close_matches(target, by_key, n=5, cutoff=0.5)
    return list(dict.fromkeys(by_key[key] for key in near))


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none at all"
