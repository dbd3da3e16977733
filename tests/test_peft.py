"""Adapters that PEFT wrote (the golden folders), read and written back without torch."""

import json
import pathlib
import shutil
import struct
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import randlora_jax as rl
from randlora_jax import peft, register_layer
from randlora_jax.linen import RandLora
from randlora_jax.peft import files, torch_names

GOLDEN = pathlib.Path(__file__).parent / "golden"
ADAPTERS = sorted(folder.name for folder in GOLDEN.glob("adapter_*"))
WEIGHTS, CONFIG = files.WEIGHTS, files.CONFIG


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(20, name="lin0")(x))
        return nn.Dense(8, name="lin2")(nn.relu(nn.Dense(20, name="lin1")(x)))


def golden_base(name="adapter_projection"):
    """(variables of the base, x, PEFT's y, PEFT's bases)"""
    io = load_file(GOLDEN / name / "io.safetensors")
    params = {
        f"lin{i}": {
            "kernel": jnp.asarray(io[f"lin{i}.weight"].T),
            "bias": jnp.asarray(io[f"lin{i}.bias"]),
        }
        for i in range(3)
    }
    return (
        {"params": params},
        io["x"],
        io["y"],
        {f"randlora_{n}": io[f"randlora_{n}"] for n in "AB"},
    )


@pytest.fixture
def folder(tmp_path):
    """A copy of adapter_projection to damage."""
    shutil.copytree(GOLDEN / "adapter_projection", tmp_path / "adapter")
    return tmp_path / "adapter"


def load(folder, name_map=None, name="adapter_projection", **options):
    return peft.load_adapter(folder, golden_base(name)[0], name_map, **options)


def rewrite(folder, change):
    """Changes the tensors of an adapter in place."""
    tensors = load_file(folder / WEIGHTS)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, folder / WEIGHTS)


def rewrite_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def same_trees(one, other):
    same = lambda a, b: a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return jax.tree.all(jax.tree.map(same, one, other))


def close(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def dense_bases(variables):
    bases = {name: np.asarray(array) for name, array in variables["randlora_bases"].items()}
    sizes = bases.get("randlora_scale", np.ones(2, np.float32))
    names = ("randlora_A", "randlora_B")
    return {n: bases[n].astype(np.float32) * s for n, s in zip(names, sizes, strict=True)}


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
        peft.save_adapter(tmp_path, variables, config)
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


class Raw(nn.Module):
    """A layer with a kernel of another name, stored (out, in)."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (20, 20))
        return x @ w.T + self.param("bias", nn.initializers.normal(), (20,))[None]


register_layer(Raw, kernel="w", input_axes=(1,))


class RawMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.DenseGeneral((4, 5), name="first")(x))
        x = nn.relu(Raw(name="second")(x.reshape(-1, 20)))
        return nn.Dense(8, name="lin2")(x)


RENAMED = {"lin0": "first", "lin1": ("second", "w[1]"), "lin2": "lin2"}


class TestNames:
    def renamed_base(self, name="adapter_projection"):
        params = golden_base(name)[0]["params"]
        first, second, _ = (params[f"lin{i}"] for i in range(3))
        return {
            "params": {
                "first": {
                    "kernel": first["kernel"].reshape(10, 4, 5),
                    "bias": first["bias"].reshape(4, 5),
                },
                "second": {"w": second["kernel"].T, "bias": second["bias"]},
                "lin2": params["lin2"],
            }
        }

    @pytest.mark.parametrize("name", ["adapter_projection", "adapter_bias_only"])
    @pytest.mark.parametrize("name_map", [RENAMED, RENAMED.__getitem__, RENAMED.get])
    def test_kernels_of_other_names_and_shapes(self, name, name_map, tmp_path):
        _, x, y, _ = golden_base(name)
        with pytest.warns(UserWarning, match="would mean other modules"):
            variables, config = peft.load_adapter(GOLDEN / name, self.renamed_base(name), name_map)
        assert set(config.target_modules) <= {"first", "second", "lin2"}
        assert close(RandLora(RawMLP(), config).apply(variables, x), y)
        mapping = {key: name_map(key) for key in RENAMED} if callable(name_map) else name_map
        peft.save_adapter(tmp_path, variables, config, mapping)
        theirs, ours = load_file(GOLDEN / name / WEIGHTS), load_file(tmp_path / WEIGHTS)
        assert {k: v.tobytes() for k, v in ours.items()} == {
            k: v.tobytes() for k, v in theirs.items()
        }
        values, ours = (json.loads((f / CONFIG).read_text()) for f in (GOLDEN / name, tmp_path))
        assert ours == values

    def test_a_function_has_no_way_back(self, tmp_path):
        variables, config = load(GOLDEN / "adapter_projection")
        with pytest.raises(ValueError, match=r"give the mapping .*module_names"):
            peft.save_adapter(tmp_path / "a", variables, config, lambda name: name)
        assert not (tmp_path / "a").exists()
        names = peft.module_names(GOLDEN / "adapter_projection")
        assert names == ["lin0", "lin1", "lin2"]
        peft.save_adapter(tmp_path / "a", variables, config, {name: name for name in names})

    @pytest.mark.parametrize(
        ("name_map", "message"),
        [
            ({"lin0": "lin0", "lin1": "lin1"}, "no place for 'lin2'"),
            (lambda name: None, "no place for 'lin0'"),
            (lambda name: 3, "wanted a dotted path"),
            (lambda name: ("lin0", -1), "counts from 0"),
            (lambda name: ("../x",), "wanted a dotted path"),
            (lambda name: "lin..0", "wanted a dotted path"),
            (lambda name: "lin1", r"one place, 'lin1', for \['lin0', 'lin1'\]"),
            (lambda name: ("lin1", int(name[-1])), "differ in shape"),
            (lambda name: f"model.{name}", "the base has no 'model.lin0.kernel'"),
            (lambda name: f"{name}.w[0]", r"no 'lin0\.w'"),
        ],
    )
    def test_maps_that_do_not_fit(self, name_map, message):
        with pytest.raises(ValueError, match=message):
            load(GOLDEN / "adapter_projection", name_map)

    def test_llama(self):
        there, back = peft.llama_name_map, peft.llama_name_map.inverse
        for name, place in (
            ("model.layers.3.self_attn.q_proj", (("layers", "self_attn", "q_proj"), 3)),
            ("model.layers.12.mlp.down_proj", (("layers", "mlp", "down_proj"), 12)),
            ("model.embed_tokens", ("embed_tokens",)),
            ("model.norm", ("norm",)),
            ("lm_head", ("lm_head",)),
            ("score", ("score",)),
        ):
            assert there(name) == place
            assert (
                back(*place if isinstance(place[1:], tuple) and len(place) == 2 else (place,))
                == name
            )
        assert there("transformer.h.0") is None
        assert back(("layers", "mlp")) is None
        assert back(("norm",), 3) is None

    def test_two_names_for_one_place(self):
        with pytest.raises(ValueError, match="'a' and for 'b'"):
            torch_names.inverse({"a": "x", "b": "x"})


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="down")(nn.relu(nn.Dense(14, name="up")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return nn.Dense(5, name="head")(layers(name="layers")(x, None)[0])


LAYERS = peft.NameMap((("model.layers.{}", "layers"), ("head", "head")))


def numbered(name):
    """LAYERS as a plain function."""
    if name == "head":
        return name
    _, _, index, rest = name.split(".")
    return f"layers.{rest}", int(index)


class TestStacks:
    @pytest.fixture
    def stack(self):
        """(base, x, a config, adapted and moved variables)"""
        x = jax.random.normal(jax.random.key(0), (3, 6))
        base = {"params": Stack().init(jax.random.key(1), x)["params"]}
        config = rl.RandLoraConfig(r=4, target_modules=["up", "down"])
        return base, x, config, self.moved(base, x, config)

    def moved(self, base, x, config):
        variables = RandLora(Stack(), config).adapt(base, x)
        varied = lambda a: a + jnp.linspace(0, 1, a.size, dtype=a.dtype).reshape(a.shape)
        scales = jax.tree.map(varied, variables["randlora"])
        return {**variables, "randlora": scales}

    def test_each_layer_has_a_name_of_its_own(self, stack, tmp_path):
        base, _, config, variables = stack
        peft.save_adapter(tmp_path, variables, config, LAYERS)
        tensors = load_file(tmp_path / WEIGHTS)
        for i in range(4):
            lam = tensors[f"base_model.model.model.layers.{i}.up.randlora_lambda"]
            np.testing.assert_array_equal(
                lam, variables["randlora"]["layers"]["up"]["randlora_lambda"][i]
            )
        for name_map in (LAYERS, numbered):
            again, config_again = peft.load_adapter(tmp_path, base, name_map)
            assert same_trees(again, variables)
            assert config_again == config

    def test_some_layers_by_layers_to_transform(self, stack, tmp_path):
        base, x, config, _ = stack
        config = config.replace(layers_to_transform=[1, 3])
        variables = self.moved(base, x, config)
        peft.save_adapter(tmp_path, variables, config, LAYERS)
        assert len(peft.module_names(tmp_path)) == 4
        again, config_again = peft.load_adapter(tmp_path, base, LAYERS)
        assert same_trees(again, variables)
        assert config_again == config

    def test_some_layers_by_their_names(self, stack, tmp_path):
        base, x, config, _ = stack
        variables = self.moved(base, x, config.replace(layers_to_transform=[1, 3]))
        peft.save_adapter(tmp_path, variables, config.replace(layers_to_transform=[1, 3]), LAYERS)
        rewrite_config(
            tmp_path, target_modules=peft.module_names(tmp_path), layers_to_transform=None
        )
        with pytest.warns(UserWarning, match=r"layers_to_transform=\(1, 3\)"):
            again, config_again = peft.load_adapter(tmp_path, base, LAYERS)
        assert same_trees(again, variables)
        assert config_again.layers_to_transform == (1, 3)
        model = RandLora(Stack(), config.replace(layers_to_transform=[1, 3]))
        expected = model.apply(variables, x)
        np.testing.assert_array_equal(RandLora(Stack(), config_again).apply(again, x), expected)

    def test_layers_that_no_config_tells(self, stack, tmp_path):
        base, _, config, variables = stack
        peft.save_adapter(tmp_path, variables, config, LAYERS)
        names = [n for n in peft.module_names(tmp_path) if n != "model.layers.2.up"]
        rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if "layers.2.up" not in k})
        rewrite_config(tmp_path, target_modules=names)
        with pytest.raises(ValueError, match="no layers_to_transform can tell"):
            peft.load_adapter(tmp_path, base, LAYERS)

    @pytest.mark.parametrize("name_map", [LAYERS, numbered])
    @pytest.mark.parametrize("missing", [0, 2, 3])
    def test_a_missing_layer(self, stack, tmp_path, name_map, missing):
        base, _, config, variables = stack
        peft.save_adapter(tmp_path, variables, config, LAYERS)
        rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if f"layers.{missing}." not in k})
        with pytest.raises(ValueError, match=rf"lacks the scales of 'model\.layers\.{missing}\."):
            peft.load_adapter(tmp_path, base, name_map)

    def test_an_extra_layer(self, stack, tmp_path):
        base, _, config, variables = stack
        peft.save_adapter(tmp_path, variables, config, LAYERS)
        more = lambda t: t | {k.replace("layers.3", "layers.4"): v for k, v in t.items()}
        rewrite(tmp_path, more)
        with pytest.raises(ValueError, match=r"'model\.layers\.4\.\w+', but .* stack of 4 layers"):
            peft.load_adapter(tmp_path, base, LAYERS)

    def test_a_stack_needs_a_name_map(self, stack, tmp_path):
        _, _, config, variables = stack
        with pytest.raises(ValueError, match=r"no module of PEFT's for 'layers\.down', layer 0"):
            peft.save_adapter(tmp_path / "a", variables, config)
        assert not (tmp_path / "a").exists()


LIN, SCALES = "base_model.model.lin", ("randlora_lambda", "randlora_gamma")


def put(tensors, key, array):
    tensors[LIN + key] = array


def each(tensors, ending, change):
    tensors |= {k: change(v).copy() for k, v in tensors.items() if k.endswith(ending)}


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
            (lambda t: put(t, "2.weight", np.ones((8, 20), "f4")), "neither modules_to_save"),
            (lambda t: put(t, "0.base_layer.bias", np.ones(20, "f4")), "neither modules_to_save"),
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


class TestSaving:
    def test_the_bases_are_in_every_layer_and_the_size_is_told(self, tmp_path):
        variables, config = load(GOLDEN / "adapter_projection")
        size = peft.save_adapter(tmp_path, variables, config)
        assert size == (tmp_path / WEIGHTS).stat().st_size
        assert sum(k.endswith("randlora_B") for k in load_file(tmp_path / WEIGHTS)) == 4

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

    @pytest.mark.parametrize("fails", ["save_file", "replace"])
    def test_a_failed_save_leaves_the_folder_as_it_was(self, folder, monkeypatch, fails):
        (folder / "io.safetensors").unlink()
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        variables, config = load(folder)

        def fail(*args, **kwargs):
            raise OSError("no space left on device")

        if fails == "save_file":
            monkeypatch.setattr(files, "save_file", fail)
        else:
            monkeypatch.setattr(pathlib.Path, "write_text", fail)
        with pytest.raises(OSError, match="no space"):
            peft.save_adapter(folder, variables, config, overwrite=True)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert sorted(p.name for p in folder.parent.iterdir()) == ["adapter"]

    def test_a_save_that_was_killed_between_its_moves(self, folder):
        variables, config = load(folder)
        folder.rename(folder.parent / "adapter.old")
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
