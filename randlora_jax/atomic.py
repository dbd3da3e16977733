"""Replacing a folder at once: a write that fails or is killed leaves what was there before."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from etils import epath

Found = TypeVar("Found")


@contextlib.contextmanager
def written_beside(
    path: epath.Path, mark: str | None = None, *, cleans_up: bool = True
) -> Iterator[epath.Path]:
    """Where to write a folder first; `take_place` moves it. Whatever is left there is removed.

    Args:
      path: where the folder belongs.
      mark: tells this write from others; several processes that write together share one.
      cleans_up: whether this process is the one that removes what is left.
    """
    new = path.parent / f"{path.name}.new-{mark or uuid.uuid4().hex[:8]}"
    try:
        yield new
    finally:
        for rest in path.parent.glob(f"{new.name}*") if cleans_up else ():
            _remove(rest)


def take_place(new: epath.Path, path: epath.Path) -> None:
    """Moves a complete folder to its place; what is there is put aside, and then removed."""
    aside = path.parent / f"{_aside(path)}{uuid.uuid4().hex[:8]}"
    if path.exists():
        path.rename(aside)
    new.rename(path)
    for old in path.parent.glob(f"{_aside(path)}*"):
        _remove(old)


def present(path: epath.Path) -> epath.Path:
    """The path, or what a write that was killed between its two moves left of it."""
    if path.exists():
        return path
    return next(iter(sorted(path.parent.glob(f"{_aside(path)}*"))), path)


def read(path: epath.Path, reader: Callable[[epath.Path], Found]) -> Found:
    """What `reader` finds in the folder; once more where another took its place meanwhile.

    So files of two folders are never read together, and a folder that is moved or removed under
    the reader's hands is no damaged one.
    """
    while True:
        before = _identity(path)
        try:
            found = reader(present(path))
        except (ValueError, FileNotFoundError):
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return found


def _identity(path: epath.Path) -> Any:
    """Differs if another folder took the place of this one, or if this one was put aside."""
    there = present(path)
    try:
        found = os.stat(there)
    except OSError:
        return None
    return str(there), found.st_ino, found.st_mtime_ns


def _aside(path: epath.Path) -> str:
    """How a folder is called while another takes its place, less some letters of its own."""
    return f".{path.name}.replaced-"


def _remove(path: epath.Path) -> None:
    with contextlib.suppress(OSError):
        path.rmtree() if path.is_dir() else path.unlink()
