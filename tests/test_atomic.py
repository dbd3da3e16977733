"""Reading a folder while another takes its place: all of one, or all of the other."""

import pytest
from etils import epath

import randlora_jax as rl
from randlora_jax import atomic
from randlora_jax.checkpoint import folders
from randlora_jax.peft import config_json
from tests.checkpoints import base, bits, trained


def folder_of(path, text):
    path.mkdir()
    for name in "ab":
        (path / name).write_text(text)
    return epath.Path(path)


def texts(folder):
    return [(folder / name).read_text() for name in "ab"]


def meanwhile(read, *events):
    """A reader that meets an event before each of its first tries, having looked where to read."""
    waiting = iter(events)

    def reader(folder, *args):
        next(waiting, lambda: None)()
        return read(folder, *args)

    return reader


def test_a_folder_that_is_put_aside_for_another_is_read_where_it_went(tmp_path):
    path = folder_of(tmp_path / "x", "old")
    first_move = lambda: path.rename(tmp_path / ".x.replaced-1")
    assert atomic.read(path, meanwhile(texts, first_move)) == ["old", "old"]


def test_a_folder_that_another_replaced_is_read_again(tmp_path):
    path, new = folder_of(tmp_path / "x", "old"), folder_of(tmp_path / "y", "new")

    def half(folder):
        first = (folder / "a").read_text()
        if new.exists():
            atomic.take_place(new, path)
        return [first, (folder / "b").read_text()]

    assert atomic.read(path, half) == ["new", "new"]


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, TypeError])
def test_what_is_wrong_with_a_folder_that_stays_is_told_at_once(tmp_path, error):
    tries = []

    def fails(folder):
        tries.append(folder)
        raise error("damaged")

    with pytest.raises(error, match="damaged"):
        atomic.read(folder_of(tmp_path / "x", "old"), fails)
    assert len(tries) == 1


def test_load_adapter_between_the_two_moves_of_a_save_loads_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "adapter"
    rl.save_adapter(path, *trained())
    first_move = lambda: path.rename(tmp_path / ".adapter.replaced-1")
    monkeypatch.setattr(folders, "restore", meanwhile(folders.restore, first_move))
    assert bits(rl.load_adapter(path, base())[0]) == bits(trained()[0])


def test_an_adapter_of_pefts_is_read_with_its_own_config(tmp_path, monkeypatch):
    path, (variables, config) = tmp_path / "adapter", trained()
    rl.peft.save_adapter(path, variables, config)
    other = config.replace(randlora_alpha=config.randlora_alpha + 1)
    read_config, changes = config_json.read_config, iter([(trained(4)[0], other)])

    def reading(file):
        found = read_config(file)
        for change in changes:
            rl.peft.save_adapter(path, *change, overwrite=True)
        return found

    monkeypatch.setattr(config_json, "read_config", reading)
    loaded, loaded_config = rl.peft.load_adapter(path, base())
    assert loaded_config.randlora_alpha == other.randlora_alpha
    assert bits(loaded["randlora"]) == bits(trained(4)[0]["randlora"])
