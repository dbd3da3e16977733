"""Nested dictionaries of arrays: the few operations that every other file needs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.core import FrozenDict, meta

from randlora_jax.quantised import codes, without_box

Path = tuple[str, ...]
Tree = Mapping[str, Any]


def items(tree: Tree, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves (whatever is no mapping, boxes included) with their paths, in sorted order."""
    for key in sorted(tree):
        if isinstance(tree[key], Mapping):
            yield from items(tree[key], (*prefix, key))
        else:
            yield (*prefix, key), tree[key]


def get(tree: Tree, path: Path) -> Any:
    """The leaf, or the tree, at a path; a KeyError if there is none."""
    node: Any = tree
    for key in path:
        node = node[key]
    return node


def build(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """The inverse of `items`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def map_with_path(fn: Callable[[Path, Any], Any], tree: Tree, prefix: Path = ()) -> dict[str, Any]:
    """The same tree with `fn(path, leaf)` in place of each leaf; what is frozen in it stays so."""
    mapped: dict[str, Any] = {}
    for key in sorted(tree):
        node = tree[key]
        path = (*prefix, key)
        mapped[key] = map_with_path(fn, node, path) if isinstance(node, Mapping) else fn(path, node)
    frozen: Any = FrozenDict(mapped) if isinstance(tree, FrozenDict) else mapped
    return frozen


def filtered(tree: Tree, keep: Callable[[Path, Any], bool]) -> dict[str, Any]:
    """The part of a tree whose leaves `keep` accepts."""
    return build({path: leaf for path, leaf in items(tree) if keep(path, leaf)})


def unboxed(tree: Any) -> Any:
    """What boxes hold, as it is: Flax's `unbox` moves it to where their names say it is."""
    is_box = lambda node: isinstance(node, meta.AxisMetadata) or without_box(node) is not node

    def value(node):
        if without_box(node) is not node:
            return unboxed(without_box(node))
        if isinstance(node, meta.Partitioned):
            return unboxed(node.unbox(apply_constraint=False))
        return unboxed(node.unbox()) if is_box(node) else node

    return jax.tree.map(value, tree, is_leaf=is_box)


def array_of(leaf: Any) -> Any:
    """The array of a leaf, without its box; of a quantised one the codes, which have its shape."""
    return unboxed(codes(leaf))


def replaced(leaf: Any, value: Any) -> Any:
    """A value in the box, if there is one, that a leaf is in; nested boxes are one of Flax's."""
    box = codes(leaf)
    return meta.replace_boxed(box, value) if isinstance(box, meta.AxisMetadata) else value


def union(*trees: Tree) -> dict[str, Any]:
    """Trees with different leaves as one; later ones win where they share a leaf."""
    return build({path: leaf for tree in trees for path, leaf in items(tree)})


def key_of(seed: int, path: Path) -> jax.Array:
    """A random key that depends on the seed and on where in the tree it is used."""
    key = jax.random.key(np.uint32(seed & 0xFFFFFFFF), impl="threefry2x32")
    return jax.random.fold_in(key, np.uint32(zlib.crc32("/".join(path).encode())))


def modules_of(paths: Iterable[Path]) -> list[str]:
    """The dotted paths of all that these leaves are in."""
    return list(dict.fromkeys(dotted(path[:i]) for path in paths for i in range(1, len(path))))


def dotted(path: Path) -> str:
    """A path as PEFT writes it: joined by dots."""
    return ".".join(path)


def shown(path: Path) -> str:
    """A path in quotes, for messages; that of the root is "(root)"."""
    return repr(dotted(path) or "(root)")
