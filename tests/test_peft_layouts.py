"""Other layouts in which PEFT's adapters come: where the bases are, prefixes, dtypes, folders."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from randlora_jax import peft
from randlora_jax.linen import RandLora
from tests.peft_adapters import (
    CONFIG,
    GOLDEN,
    MLP,
    WEIGHTS,
    close,
    golden_base,
    golden_copy,
    load,
    rewrite,
    rewrite_config,
)


@pytest.fixture
def folder(tmp_path):
    return golden_copy(tmp_path)


class TestLayouts:
    def expect(self, folder):
        variables, x, y, _ = golden_base()
        variables, config = peft.load_adapter(folder, variables)
        assert close(RandLora(MLP(), config).apply(variables, x), y)

    def test_one_pair_for_the_model(self, folder):
        keep = lambda key: "randlora_A" not in key and "randlora_B" not in key
        keep_too = ("base_model.randlora_A", "base_model.randlora_B")
        rewrite(folder, lambda t: {k: v for k, v in t.items() if keep(k) or k in keep_too})
        assert len(load_file(folder / WEIGHTS)) == 8
        self.expect(folder)

    def test_without_the_prefix_and_the_model_s_pair(self, folder):
        prefix = "base_model.model."
        rewrite(folder, lambda t: {k.removeprefix(prefix): v for k, v in t.items() if prefix in k})
        self.expect(folder)

    @pytest.mark.parametrize("rename", [
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("randlora_", "_orig_mod.randlora_"),
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"_fsdp_wrapped_module.{key}".replace("lin", "_checkpoint_wrapped_module.lin"),
        lambda key: f"module.{key}",
    ])  # fmt: skip
    def test_names_that_torch_s_wrappers_put_into_keys(self, folder, rename):
        rewrite(folder, lambda tensors: {rename(key): value for key, value in tensors.items()})
        self.expect(folder)

    def test_one_tensor_under_two_names_is_refused(self, folder):
        key = "base_model.model.lin0.randlora_gamma"
        rewrite(folder, lambda t: t | {key.replace("lin0", "_orig_mod.lin0"): t[key] + 1})
        with pytest.raises(ValueError, match=rf"{key} are the same: leave one of them out"):
            self.expect(folder)

    def test_without_the_prefix_and_with_one_layer_s_pair(self, folder):
        prefix, dropped = "base_model.model.", ("lin1.randlora_A", "lin1.randlora_B")
        rewrite(
            folder,
            lambda t: {
                k.removeprefix(prefix): v
                for k, v in t.items()
                if prefix in k and not k.endswith(dropped)
            },
        )
        self.expect(folder)

    @pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
    def test_narrower_scales_are_widened(self, folder, dtype):
        narrow = lambda k, v: v if k.endswith(("_A", "_B")) else v.astype(dtype)
        rewrite(folder, lambda t: {k: narrow(k, v) for k, v in t.items()})
        variables, _ = load(folder)
        lam = variables["randlora"]["lin1"]["randlora_lambda"]
        assert lam.dtype == jnp.float32
        theirs = load_file(folder / WEIGHTS)["base_model.model.lin1.randlora_lambda"]
        np.testing.assert_array_equal(lam, theirs.astype(np.float32))

    def test_the_model_s_pair_wins_over_another_copy(self, folder):
        def change(tensors):
            tensors["base_model.model.lin1.randlora_B"] += 1

        rewrite(folder, change)
        with pytest.warns(UserWarning, match=r"lin1\.randlora_B is not base_model\.randlora_B"):
            self.expect(folder)

    def test_copies_that_differ_without_the_model_s_pair(self, folder):
        def change(tensors):
            tensors["base_model.model.lin1.randlora_B"] += 1
            del tensors["base_model.randlora_B"]

        rewrite(folder, change)
        with pytest.raises(ValueError, match="lin1"):
            load(folder)

    def test_bases_in_spite_of_the_config_are_taken(self, folder):
        rewrite_config(folder, save_projection=False)
        with pytest.warns(UserWarning, match="save_projection=False"):
            self.expect(folder)

    def test_adapters_in_sub_folders(self, folder):
        shutil.copytree(GOLDEN / "adapter_sparse", folder / "other")
        assert not load(folder)[1].sparse
        assert load(folder, adapter_name="other")[1].sparse
        assert load(folder / "other")[1].sparse
        (folder / CONFIG).unlink()
        with pytest.raises(FileNotFoundError, match=r"adapter_name can be one of \['other'\]"):
            load(folder)

    def test_what_peft_takes_no_notice_of(self, folder):
        rewrite_config(
            folder, target_modules="lin[012]", layers_to_transform=[7], layers_pattern="x"
        )
        with pytest.warns(UserWarning, match="layers_pattern"):
            self.expect(folder)
