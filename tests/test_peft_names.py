"""PEFT's names for modules, and the maps from them to places in Flax and back."""

import json

import flax.linen as nn
import pytest
from safetensors.numpy import load_file

from randlora_jax import peft, register_layer
from randlora_jax.linen import RandLora
from randlora_jax.peft.names import inverse
from tests.peft_adapters import CONFIG, GOLDEN, WEIGHTS, close, golden_base, load


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
        peft.save_adapter(tmp_path, variables, config, mapping, layout="copies")
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
            inverse({"a": "x", "b": "x"})
