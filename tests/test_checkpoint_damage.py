"""Damaged checkpoints: each is refused, or what it lost did not matter."""

import random
import shutil

import jax
import pytest

import randlora_jax as rl
from tests.checkpoints import base, bits, make

REFUSED = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module", params=[True, False], ids=["with bases", "without bases"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    variables, config = make(
        bias="all", modules_to_save=["head"], randlora_alpha=6, save_projection=request.param
    )
    rl.save_adapter(folder, variables, config)
    return folder, variables, config


@pytest.fixture
def damaged(saved, tmp_path):
    """(a copy to damage, a check that it is refused or loads exactly, and says which)"""
    folder, variables, config = saved
    copy = tmp_path / "adapter"
    shutil.copytree(folder, copy)

    def is_refused():
        try:
            loaded, loaded_config = rl.load_adapter(copy, base())
        except REFUSED:
            return True
        assert loaded_config == config
        assert bits(loaded) == bits(variables)
        return False

    return copy, is_refused


def all_files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def holding(folder, text):
    """The one file that says this in so many words."""
    (path,) = (p for p in all_files(folder) if text in p.read_bytes())
    return path


def is_text(content):
    try:
        return content.decode().isprintable()
    except UnicodeDecodeError:
        return False


def arrays(folder):
    """The files that hold arrays: there can be copies, of which only some are read."""
    binary = [p for p in all_files(folder) if not is_text(p.read_bytes())]
    return [p for p in binary if p.stat().st_size > 500]


@pytest.mark.parametrize("seed", range(30))
def test_flipped_bits_are_refused_or_do_not_matter(damaged, seed):
    folder, is_refused = damaged
    rng = random.Random(seed)
    path = rng.choice(all_files(folder))
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 8])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    is_refused()


@pytest.mark.parametrize("seed", range(14))
def test_files_cut_short_are_refused_or_do_not_matter(damaged, seed):
    folder, is_refused = damaged
    rng = random.Random(seed)
    path = rng.choice(all_files(folder))
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    is_refused()


def test_any_missing_file_is_refused_or_does_not_matter(damaged):
    folder, is_refused = damaged
    refused = 0
    for path in all_files(folder):
        content = path.read_bytes()
        path.unlink()
        refused += is_refused()
        path.write_bytes(content)
    assert refused >= 2
    assert not is_refused()


@pytest.mark.parametrize("part", [0.2, 0.35, 0.5])
def test_flipped_bits_in_the_arrays_are_refused(damaged, part):
    folder, is_refused = damaged
    for path in arrays(folder):
        content = bytearray(path.read_bytes())
        content[int(part * len(content))] ^= 16
        path.write_bytes(content)
    assert is_refused()


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bits_in_what_is_written_as_text_are_refused_or_do_not_matter(damaged, seed):
    folder, is_refused = damaged
    rng = random.Random(seed)
    path = holding(folder, b'"randlora_alpha"')
    content = path.read_bytes()
    for _ in range(6):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(7)
        path.write_bytes(flipped)
        is_refused()


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"randlora_alpha": 6', b'"randlora_alpha": 7'),
        (b'"arrays"', b'"arrayz"'),
        (b'"bases": {', b'"basis": {'),
        (b'"r": 3', b'"r": 0'),
        (b'"r": 3', b'"r": []'),
        (b'"config": {', b'"konfig": {'),
        (b'"fingerprint"', b'"fingerprind"'),
    ],
    ids=str,
)
def test_an_altered_description_is_refused(damaged, old, new):
    folder, _ = damaged
    path = holding(folder, b'"randlora_alpha"')
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError, match=f"{folder}.*cut short or altered"):
        rl.load_adapter(folder, base())


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("collection", ["params", "randlora"])
def test_arrays_of_another_adapter_are_refused(tmp_path, save_projection, collection):
    variables, config = make(modules_to_save=["head"], save_projection=save_projection)
    moved = jax.tree.map(lambda a: a * 1.001, variables[collection])
    rl.save_adapter(tmp_path / "adapter", variables, config)
    rl.save_adapter(tmp_path / "other", variables | {collection: moved}, config)
    text = b'"randlora_alpha"'
    shutil.copy(holding(tmp_path / "other", text), holding(tmp_path / "adapter", text))
    with pytest.raises(ValueError, match=rf"adapter is cut short or altered: {collection}/"):
        rl.load_adapter(tmp_path / "adapter", base())


def test_a_newer_format_is_refused_by_number(damaged):
    folder, _ = damaged
    path = holding(folder, b'"randlora_format"')
    path.write_bytes(path.read_bytes().replace(b'"randlora_format": 1', b'"randlora_format": 2'))
    with pytest.raises(ValueError, match=r"format 2, and this library reads 1.*newer"):
        rl.load_adapter(folder, base())


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a file", "half of an adapter"])
def test_what_is_no_adapter_is_refused_by_path(damaged, tmp_path, what):
    folder = damaged[0] if what == "half of an adapter" else tmp_path / "other"
    if what == "an empty folder":
        folder.mkdir()
    elif what == "a file":
        folder.write_text("not an adapter")
    elif what == "half of an adapter":
        (folder / "_METADATA").unlink()
    with pytest.raises(FileNotFoundError, match=f"{folder} is no adapter"):
        rl.load_adapter(folder, base())


def test_a_failed_load_changes_nothing(damaged):
    folder, is_refused = damaged
    for path in arrays(folder):
        path.write_bytes(path.read_bytes()[:-40])
    content, before = {p: p.read_bytes() for p in all_files(folder)}, bits(base())
    assert is_refused()
    assert {p: p.read_bytes() for p in all_files(folder)} == content
    assert bits(base()) == before
