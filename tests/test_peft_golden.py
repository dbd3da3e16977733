"""Adapters that PEFT wrote (the golden folders), read and written back without torch."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import randlora_jax as rl
from randlora_jax import peft
from randlora_jax.linen import RandLora
from tests.peft_adapters import (
    ADAPTERS,
    CONFIG,
    GOLDEN,
    MLP,
    WEIGHTS,
    close,
    dense_bases,
    golden_base,
    load,
    rewrite,
    same_trees,
)


@pytest.mark.filterwarnings("ignore:the file has a seed")
@pytest.mark.parametrize("name", ADAPTERS)
class TestEveryGoldenAdapter:
    def test_outputs_are_those_of_peft(self, name):
        variables, x, y, _ = golden_base(name)
        variables, config = peft.load_adapter(GOLDEN / name, variables)
        assert close(RandLora(MLP(), config).apply(variables, x), y)
        assert close(MLP().apply({"params": rl.merge(variables, config)}, x), y)

    def test_bases_are_those_of_peft_bit_for_bit(self, name):
        variables, _, _, theirs = golden_base(name)
        variables, _ = peft.load_adapter(GOLDEN / name, variables)
        for key, array in dense_bases(variables).items():
            assert array.tobytes() == theirs[key].tobytes()

    def test_scales_are_those_of_the_file(self, name):
        tensors = load_file(GOLDEN / name / WEIGHTS)
        variables, _ = load(GOLDEN / name, name=name)
        for module, scales in variables["randlora"].items():
            for label, array in scales.items():
                theirs = tensors[f"base_model.model.{module}.{label}"]
                assert np.asarray(array).tobytes() == theirs.tobytes()

    def test_it_goes_back_to_the_same_file(self, name, tmp_path):
        variables, config = load(GOLDEN / name, name=name)
        peft.save_adapter(tmp_path, variables, config, layout="copies")
        theirs, ours = load_file(GOLDEN / name / WEIGHTS), load_file(tmp_path / WEIGHTS)
        for key, array in ours.items():
            if key in theirs or name != "adapter_seed":  # which has no bases in it
                assert array.tobytes() == theirs[key].tobytes()
        hidden = {f"base_model.model.lin2.{n}.bias" for n in ("modules_to_save", "original_module")}
        assert set(theirs) - set(ours) <= hidden
        values, ours = (json.loads((f / CONFIG).read_text()) for f in (GOLDEN / name, tmp_path))
        assert ours == values | {"save_projection": True}

    def test_it_comes_back_from_that_file(self, name, tmp_path):
        variables, config = load(GOLDEN / name, name=name)
        peft.save_adapter(tmp_path, variables, config)
        again, config_again = load(tmp_path, name=name)
        assert same_trees(again, variables)
        assert config_again == config

    def test_the_base_is_neither_copied_nor_changed(self, name):
        base = golden_base(name)[0]
        before = jax.tree.map(np.array, base)
        variables, config = peft.load_adapter(GOLDEN / name, base)
        assert same_trees(base, before)
        for path, label in rl.training.trees.items(rl.labels(variables, config)["params"]):
            if label == "frozen":
                assert variables["params"][path[0]][path[1]] is base["params"][path[0]][path[1]]


def test_a_seed_alone_is_told_with_the_way_out():
    with pytest.warns(UserWarning, match=r"torch >= 2\.12.*save_projection=True"):
        _, config = load(GOLDEN / "adapter_seed")
    assert config.save_projection  # so that what is saved next has its bases


def test_ternary_bases_are_held_as_int8():
    variables, config = load(GOLDEN / "adapter_sparse")
    assert config.sparse
    assert variables["randlora_bases"]["randlora_B"].dtype == jnp.int8


def test_ternary_bases_that_are_not_exactly_so_stay_as_they_are(tmp_path):
    shutil.copytree(GOLDEN / "adapter_sparse", tmp_path / "a")

    def change(tensors):
        for key in tensors:
            if key.endswith("randlora_B"):
                tensors[key].flat[0] = 0.1

    rewrite(tmp_path / "a", change)
    variables, config = load(tmp_path / "a")
    peft.save_adapter(tmp_path / "b", variables, config)
    saved = load_file(tmp_path / "b" / WEIGHTS)["base_model.randlora_B"]
    assert saved.tobytes() == load_file(tmp_path / "a" / WEIGHTS)["base_model.randlora_B"].tobytes()


def test_a_library_adapter_survives_its_own_checkpoint_too(tmp_path):
    variables, config = load(GOLDEN / "adapter_sparse")
    rl.save_adapter(tmp_path / "ours", variables, config)
    again, config_again = rl.load_adapter(tmp_path / "ours", golden_base()[0])
    assert same_trees(again, variables)
    assert config_again == config
