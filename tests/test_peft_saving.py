"""Saving adapters for PEFT: what is written, what is kept, what a failed save leaves."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

import randlora_jax as rl
from randlora_jax import peft
from randlora_jax.linen import RandLora
from randlora_jax.peft import files
from tests.peft_adapters import (
    CONFIG,
    GOLDEN,
    MLP,
    WEIGHTS,
    dense_bases,
    golden_base,
    golden_copy,
    load,
    same_trees,
)


@pytest.fixture
def folder(tmp_path):
    return golden_copy(tmp_path)


class TestSaving:
    @pytest.mark.parametrize("options, pairs", [({}, 1), ({"layout": "copies"}, 4)])
    def test_the_bases_are_there_once_or_in_every_layer_too(self, tmp_path, options, pairs):
        variables, config = load(GOLDEN / "adapter_projection")
        size = peft.save_adapter(tmp_path, variables, config, **options)
        assert size == (tmp_path / WEIGHTS).stat().st_size
        tensors = load_file(tmp_path / WEIGHTS)
        assert sum(k.endswith("randlora_B") for k in tensors) == pairs
        assert {"base_model.randlora_A", "base_model.randlora_B"} <= set(tensors)
        assert same_trees(load(tmp_path)[0], variables)

    def test_another_layout_is_refused_before_any_work(self, tmp_path):
        variables, config = load(GOLDEN / "adapter_projection")
        with pytest.raises(ValueError, match=r"layout='layers' must be one of \['shared'"):
            peft.save_adapter(tmp_path / "a", variables, config, layout="layers")
        assert not (tmp_path / "a").exists()

    def test_what_is_there_is_kept_unless_told(self, folder):
        before = (folder / WEIGHTS).read_bytes()
        variables, config = load(folder)
        variables["randlora"]["lin0"]["randlora_lambda"] += 1
        with pytest.raises(FileExistsError, match="overwrite=True"):
            peft.save_adapter(folder, variables, config)
        assert (folder / WEIGHTS).read_bytes() == before
        with pytest.raises(FileExistsError, match=r"has 'io\.safetensors' too"):
            peft.save_adapter(folder, variables, config, overwrite=True)
        (folder / "io.safetensors").unlink()
        (folder / "README.md").write_text("card")
        peft.save_adapter(folder, variables, config, overwrite=True)
        assert same_trees(load(folder)[0], variables)
        assert (folder / "README.md").read_text() == "card"
        assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"]

    def test_a_folder_with_an_adapter_of_ours_is_left_alone(self, tmp_path):
        variables, config = load(GOLDEN / "adapter_projection")
        rl.save_adapter(tmp_path / "a", variables, config)
        before = sorted(p.name for p in (tmp_path / "a").iterdir())
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="an adapter of this library"):
                peft.save_adapter(tmp_path / "a", variables, config, overwrite=overwrite)
        assert sorted(p.name for p in (tmp_path / "a").iterdir()) == before
        rl.load_adapter(tmp_path / "a", golden_base()[0])

    @pytest.mark.parametrize("fails", ["weights", "config"])
    def test_a_failed_save_leaves_the_folder_as_it_was(self, folder, monkeypatch, fails):
        (folder / "io.safetensors").unlink()
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        variables, config = load(folder)

        def fail(*args, **kwargs):
            raise OSError("no space left on device")

        if fails == "weights":
            monkeypatch.setattr(files, "save_file", fail)
        else:
            monkeypatch.setattr(type(epath.Path(folder)), "write_text", fail)
        with pytest.raises(OSError, match="no space"):
            peft.save_adapter(folder, variables, config, overwrite=True)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"]

    def test_a_save_that_was_killed_between_its_moves(self, folder):
        variables, config = load(folder)
        folder.rename(folder.parent / ".adapter.replaced-0")
        assert same_trees(load(folder)[0], variables)
        peft.save_adapter(folder, variables, config)
        assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"]

    def test_names_of_adapters_become_sub_folders(self, tmp_path):
        variables, config = load(GOLDEN / "adapter_projection")
        for name in ("b", "default", "a"):
            peft.save_adapter(tmp_path / "x", variables, config, adapter_name=name)
        for name in ("b", "default", "a"):
            assert same_trees(load(tmp_path / "x", adapter_name=name)[0], variables)
        with pytest.raises(FileExistsError, match="has 'a' too"):
            peft.save_adapter(tmp_path / "x", variables, config, overwrite=True)

    def test_several_adapters_are_saved_one_by_one(self, tmp_path):
        variables, config = load(GOLDEN / "adapter_projection")
        with pytest.raises(TypeError, match=r"adapters\.select"):
            peft.save_adapter(tmp_path, variables, {"a": config})

    def test_a_seed_that_torch_does_not_take_is_cut_to_what_counts(self, tmp_path):
        variables, config = load(GOLDEN / "adapter_projection")
        for seed, written in ((2**70 + 3, 3), (2**63 + 3, 2**63 + 3), (-(2**63), -(2**63))):
            peft.save_adapter(
                tmp_path, variables, config.replace(projection_prng_key=seed), overwrite=True
            )
            assert json.loads((tmp_path / CONFIG).read_text())["projection_prng_key"] == written

    @pytest.mark.parametrize(
        "changes",
        [
            {"target_modules": "all-linear"},
            {"target_modules": "lin.", "exclude_modules": ["lin9"]},
            {"target_modules": "all-linear", "exclude_modules": "nothing"},
        ],
    )
    def test_targets_that_peft_lacks_words_for_become_names(self, tmp_path, changes):
        variables, config = load(GOLDEN / "adapter_projection")
        peft.save_adapter(tmp_path, variables, config.replace(**changes))
        values = json.loads((tmp_path / CONFIG).read_text())
        assert values["target_modules"] == ["lin0", "lin1", "lin2"]
        assert "exclude_modules" not in values

    def test_scales_of_another_model(self, tmp_path):
        variables, config = load(GOLDEN / "adapter_projection")
        del variables["params"]["lin1"]
        with pytest.raises(ValueError, match="lin1"):
            peft.save_adapter(tmp_path / "a", variables, config)
        assert not (tmp_path / "a").exists()

    def test_bases_of_jax_are_written_in_float32(self, tmp_path):
        config = rl.RandLoraConfig(r=4, target_modules=["lin0", "lin2"], very_sparse=True)
        variables = RandLora(MLP(), config).adapt(golden_base()[0], jnp.ones((1, 10)))
        peft.save_adapter(tmp_path, variables, config)
        A = load_file(tmp_path / WEIGHTS)["base_model.randlora_A"]
        assert A.dtype == np.float32
        np.testing.assert_array_equal(A, dense_bases(variables)["randlora_A"])
        again, config_again = load(tmp_path)
        assert same_trees(again, variables)
        assert config_again == config
