"""Saving where something is already: refused, or the old adapter stays until the new is whole."""

import functools
import os

import pytest

import randlora_jax as rl
from tests.checkpoints import base, bits, files, trained


@pytest.mark.parametrize("what", ["adapter", "folder", "file"])
def test_what_exists_is_not_overwritten_unasked(tmp_path, what):
    path = tmp_path / "adapter"
    if what == "adapter":
        rl.save_adapter(path, *trained())
    elif what == "folder":
        path.mkdir()
        (path / "precious").write_text("mine")
    else:
        path.write_text("mine")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=r"adapter exists already.*overwrite=True"):
        rl.save_adapter(path, *trained(4))
    assert files(tmp_path) == before


def test_a_folder_that_is_no_adapter_is_not_overwritten_at_all(tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already and is no adapter"):
        rl.save_adapter(tmp_path, *trained(), overwrite=True)
    assert (tmp_path / "precious").read_text() == "mine"


def test_overwrite_puts_the_new_adapter_in_place_of_the_old_one(tmp_path):
    rl.save_adapter(tmp_path / "adapter", *trained())
    variables, config = trained(4)
    rl.save_adapter(tmp_path / "adapter", variables, config, overwrite=True)
    loaded, loaded_config = rl.load_adapter(tmp_path / "adapter", base())
    assert (bits(loaded), loaded_config) == (bits(variables), config)
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("suffix", [".old", ".new", ".bak", ".tmp"])
def test_a_save_leaves_the_folders_beside_it_alone(tmp_path, suffix):
    mine = tmp_path / f"adapter{suffix}"
    rl.save_adapter(mine, *trained(4))
    before = files(mine)
    rl.save_adapter(tmp_path / "adapter", *trained())
    rl.save_adapter(tmp_path / "adapter", *trained(), overwrite=True)
    assert mine.exists()
    assert files(mine) == before


def test_a_save_that_fails_at_any_move_keeps_the_old_adapter_or_the_new(tmp_path, monkeypatch):
    states = [bits(trained(seed)[0]) for seed in (3, 4)]
    failed, moves = 0, {name: getattr(os, name) for name in ("rename", "replace")}
    for which in range(20):
        folder, calls = tmp_path / str(which), iter(range(1000))
        rl.save_adapter(folder / "adapter", *trained(3))

        def move(name, *args, calls=calls, which=which, **kwargs):
            if next(calls) == which:
                raise OSError("no space left on device")
            return moves[name](*args, **kwargs)

        with monkeypatch.context() as patch:
            for name in moves:
                patch.setattr(os, name, functools.partial(move, name))
            try:
                rl.save_adapter(folder / "adapter", *trained(4), overwrite=True)
            except OSError:
                failed += 1
            else:
                break
        assert bits(rl.load_adapter(folder / "adapter", base())[0]) in states
        rl.save_adapter(folder / "adapter", *trained(4), overwrite=True)
        assert bits(rl.load_adapter(folder / "adapter", base())[0]) == states[1]
    assert 2 <= failed < 20
