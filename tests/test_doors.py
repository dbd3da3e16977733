"""What is public: what the doors list, and nothing else by their names."""

import inspect
import pathlib

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


def test_the_version_is_the_one_that_is_installed():
    from importlib.metadata import version

    assert rl.__version__ == version("randlora_jax")


def test_the_operation_knows_nothing_of_flax():
    for path in pathlib.Path(ops.__file__).parent.glob("*.py"):
        assert "flax" not in path.read_text().replace("Flax", ""), path
