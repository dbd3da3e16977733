"""Damaged, hostile and unfit adapters are refused, with a message that says why."""

import json
import shutil
import struct
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import randlora_jax as rl
from randlora_jax import peft
from randlora_jax.linen import RandLora
from tests.peft_adapters import (
    CONFIG,
    GOLDEN,
    MLP,
    WEIGHTS,
    golden_base,
    golden_copy,
    load,
    rewrite,
    rewrite_config,
)

LIN, SCALES = "base_model.model.lin", ("randlora_lambda", "randlora_gamma")


def put(tensors, key, array):
    tensors[LIN + key] = array


def each(tensors, ending, change):
    tensors |= {k: change(v).copy() for k, v in tensors.items() if k.endswith(ending)}


@pytest.fixture
def folder(tmp_path):
    return golden_copy(tmp_path)


class TestDamage:
    def test_cut_short_anywhere(self, folder):
        content = (folder / WEIGHTS).read_bytes()
        for length in (0, 4, 8, 100, 1000, len(content) // 2, len(content) - 1):
            (folder / WEIGHTS).write_bytes(content[:length])
            with pytest.raises(ValueError, match=WEIGHTS):
                load(folder)

    @pytest.mark.parametrize(
        "header",
        [
            b"not json",
            {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
            {"a": {"dtype": "F32", "shape": [2**33, 2**33], "data_offsets": [0, 4]}},
            {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
            {"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}},
            {"lin0.randlora_lambda": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
            {},
        ],
    )  # fmt: skip
    def test_hostile_headers(self, folder, header):
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
        with pytest.raises(ValueError, match=WEIGHTS):
            load(folder)

    def test_a_header_larger_than_the_file(self, folder):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60))
        with pytest.raises(ValueError, match=WEIGHTS):
            load(folder)

    def test_random_changes_are_refused_or_harmless(self, folder):
        rng = np.random.default_rng(0)
        files = {name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)}
        base = golden_base()[0]
        refused = 0
        for _ in range(150):
            name = (WEIGHTS, CONFIG)[rng.integers(2)]
            content = bytearray(files[name])
            # The header and the config are where a changed byte can mean something else.
            content[rng.integers(min(len(content), 1500))] = rng.integers(256)
            (folder / name).write_bytes(content)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    variables, config = peft.load_adapter(folder, base)
                    RandLora(MLP(), config).merge(variables, safe=False)
                except (ValueError, FileNotFoundError):
                    refused += 1
            (folder / name).write_bytes(files[name])
        assert refused > 50

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no JSON"),
            ("{", "no JSON"),
            ("[" * 100000, "no JSON"),
            ("[1]", "must hold an object"),
            ('{"peft_type": "LORA", "r": 4}', "not a RandLoRA adapter"),
            ('{"peft_type": "RANDLORA", "r": 0}', "r must be at least 1"),
            ('{"peft_type": "RANDLORA", "r": "4"}', "r must be an integer"),
            ('{"peft_type": "RANDLORA", "r": 5, "target_modules": ["lin0"]}', "r=5 does not give"),
        ],
    )
    def test_bad_configs(self, folder, text, message):
        (folder / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message):
            load(folder)

    def test_a_pickle_is_refused_with_the_reason(self, folder):
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
        with pytest.raises(ValueError, match="can execute code"):
            load(folder)

    @pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
    def test_missing_files(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load(folder)
        with pytest.raises(FileNotFoundError, match=CONFIG):
            load(folder / "absent")

    def test_a_repository_s_name_is_no_folder(self):
        with pytest.raises(FileNotFoundError, match=r"snapshot_download\('someone/adapter'\)"):
            load("someone/adapter")

    @pytest.mark.parametrize(
        "name", ["..", ".", "", "../adapter", "a/b", "a\\b", "/etc", "c:x", "a\0"]
    )
    def test_adapter_names_are_no_paths(self, folder, name):
        variables, config = load(folder)
        with pytest.raises(ValueError, match="must be a plain name"):
            load(folder, adapter_name=name)
        with pytest.raises(ValueError, match="must be a plain name"):
            peft.save_adapter(folder, variables, config, adapter_name=name)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop(LIN + "1.randlora_gamma"), "lacks the randlora_gamma of 'lin1'"),
            (lambda t: t.pop(LIN + "1.randlora_lambda"), "lacks the randlora_lambda of 'lin1'"),
            (lambda t: [t.pop(LIN + "1." + n) for n in SCALES], "lacks the scales of 'lin1'"),
            (lambda t: [t.pop(k) for k in list(t) if k.endswith("_A")], "lacks randlora_A"),
            (lambda t: put(t, "2.randlora_gamma", np.ones((2, 7), "f4")), "of another model"),
            (lambda t: put(t, "2.randlora_gamma", np.ones((3, 8), "f4")), "r=4 does not give"),
            (lambda t: each(t, "_A", lambda a: a[:, :, :19]), "don't fit r=4"),
            (lambda t: each(t, "_B", lambda a: a[:19]), "too small"),
            (lambda t: put(t, "2.weight", np.ones((8, 21), "f4")), "Neither modules_to_save"),
            (lambda t: put(t, "3.weight", np.ones((8, 20), "f4")), "Neither modules_to_save"),
            (lambda t: put(t, "3.bias", np.zeros(20, "f4")), "nothing in the base equals it"),
            (lambda t: each(t, "_lambda", lambda a: a.astype("i4")), "dtype I32"),
            (lambda t: each(t, "_lambda", lambda a: a.astype("f8")), "jax_enable_x64"),
            (lambda t: [put(t, "3." + n, t[LIN + "2." + n].copy()) for n in SCALES],
             r"no 'lin3\.kernel'"),
        ],
    )  # fmt: skip
    def test_wrong_tensors(self, folder, change, message):
        rewrite(folder, lambda tensors: [change(tensors)])
        with pytest.raises(ValueError, match=message):
            load(folder)

    @pytest.mark.parametrize("dropped", ["lin0.base_layer.bias", "lin2.weight", "lin2.bias"])
    def test_missing_biases_and_saved_modules(self, tmp_path, dropped):
        shutil.copytree(GOLDEN / "adapter_bias_only", tmp_path / "a")
        rewrite(tmp_path / "a", lambda t: {k: v for k, v in t.items() if not k.endswith(dropped)})
        with pytest.raises(ValueError, match="lacks all or part of"):
            load(tmp_path / "a")

    def test_another_base(self, folder):
        base = golden_base()[0]
        base["params"]["lin1"]["kernel"] = jnp.ones((20, 21))
        with pytest.raises(ValueError, match="lin1"):
            peft.load_adapter(folder, base)
        del base["params"]["lin1"]
        with pytest.raises(ValueError, match=r"no 'lin1\.kernel'"):
            peft.load_adapter(folder, base)

    def test_a_saved_module_of_another_shape(self):
        base = golden_base("adapter_bias")[0]
        base["params"]["lin2"]["kernel"] = jnp.ones((20, 9))
        with pytest.raises(ValueError, match=r"\(8, 20\) for 'lin2\.kernel' of \(20, 9\)"):
            peft.load_adapter(GOLDEN / "adapter_bias", base)

    def test_a_convolution_is_not_guessed(self, tmp_path):
        class Seeing(MLP):
            @nn.compact
            def __call__(self, x):
                return super().__call__(nn.Conv(10, (1, 3), name="patches")(x)[0, 0])

        base = Seeing().init(jax.random.key(0), jnp.ones((1, 1, 4, 10)))
        config = rl.RandLoraConfig(r=4, target_modules=["lin0"], modules_to_save=["patches"])
        rewrite_config(golden_copy(tmp_path), **config.to_dict())
        key = "base_model.model.patches."
        weights = {"weight": np.ones((10, 10, 1, 3), "f4"), "bias": np.ones(10, "f4")}
        of_lin0 = lambda t: {k: v for k, v in t.items() if "lin1" not in k and "lin2" not in k}
        rewrite(
            tmp_path / "adapter", lambda t: of_lin0(t) | {key + k: v for k, v in weights.items()}
        )
        with pytest.raises(ValueError, match="looks like a convolution"):
            peft.load_adapter(tmp_path / "adapter", base)

    def test_a_square_weight_under_fan_in_fan_out_is_not_guessed(self, tmp_path):
        config = rl.RandLoraConfig(
            r=4, target_modules=["lin0"], modules_to_save=["lin1"], fan_in_fan_out=True
        )
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            variables = RandLora(MLP(), config).adapt(golden_base()[0], jnp.ones((1, 10)))
        with pytest.raises(ValueError, match="Conv1D"):
            peft.save_adapter(tmp_path, variables, config)
        peft.save_adapter(tmp_path, variables, config.replace(fan_in_fan_out=False))
        rewrite_config(tmp_path, fan_in_fan_out=True)
        with pytest.raises(ValueError, match="Conv1D"):
            load(tmp_path)
