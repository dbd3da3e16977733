"""What is public: what the doors list, and nothing else by their names."""

import ast
import importlib.metadata
import inspect
import pathlib
import re

import pytest

import randlora_jax as rl
from randlora_jax import adapters, checkpoint, linen, nnx, ops, peft

DOORS = [rl, adapters, checkpoint, linen, nnx, ops, peft]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_door_shows_what_it_lists_and_its_rooms(door):
    rooms = {path.stem for path in pathlib.Path(door.__file__).parent.iterdir()}
    shown = {name for name in dir(door) if not name.startswith("_")}
    assert shown - rooms <= set(door.__all__)
    assert all(hasattr(door, name) for name in door.__all__)
    for name in shown & rooms - set(door.__all__):
        assert inspect.ismodule(getattr(door, name)), name


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_door_has_no_code_of_its_own(door):
    lines = inspect.getsource(door).splitlines()
    assert not [line for line in lines if line.startswith(("def ", "class ", "@"))]


def rows():
    """The files and folders of each row of CONTRIBUTING's table of the code."""
    text = (pathlib.Path(__file__).parents[1] / ".github" / "CONTRIBUTING.md").read_text()
    table = text.split("## The code")[1].split("## ")[0]
    for line in re.findall(r"^\| (`.*?) \|", table, flags=re.M):
        yield [name.removesuffix(".py").rstrip("/") for name in re.findall(r"`(.+?)`", line)]


def test_a_file_imports_from_its_row_of_the_map_and_from_those_above():
    package = pathlib.Path(rl.__file__).parent
    order = {name: i for i, names in enumerate(rows()) for name in names}
    there = {path.stem for path in package.iterdir()} - {
        "__init__",
        "__main__",
        "__pycache__",
        "py",
    }
    assert there == set(order)
    for path in package.rglob("*.py"):
        own = path.relative_to(package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())) if own in order else ():
            if isinstance(node, ast.Import):
                assert not [a for a in node.names if a.name.startswith("randlora_jax")], path
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("randlora_jax"):
                assert not node.level, path
                parts = node.module.split(".")[1:2] or [alias.name for alias in node.names]
                assert all(order[part] <= order[own] for part in parts), (path, parts)


def test_the_version_is_the_one_that_is_installed():
    assert rl.__version__ == importlib.metadata.version("randlora_jax")


def test_the_operation_knows_nothing_of_flax():
    for path in pathlib.Path(ops.__file__).parent.glob("*.py"):
        assert "flax" not in path.read_text().replace("Flax", ""), path
