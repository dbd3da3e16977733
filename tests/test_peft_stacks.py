"""Stacked layers, which PEFT's files hold one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import randlora_jax as rl
from randlora_jax import peft
from randlora_jax.linen import RandLora
from tests.peft_adapters import WEIGHTS, in_peft, rewrite, rewrite_config, same_trees


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
            assert same_trees(again, in_peft(variables, config))
            assert config_again == config

    def test_some_layers_by_layers_to_transform(self, stack, tmp_path):
        base, x, config, _ = stack
        config = config.replace(layers_to_transform=[1, 3])
        variables = self.moved(base, x, config)
        peft.save_adapter(tmp_path, variables, config, LAYERS)
        assert len(peft.module_names(tmp_path)) == 4
        again, config_again = peft.load_adapter(tmp_path, base, LAYERS)
        assert same_trees(again, in_peft(variables, config))
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
        assert same_trees(again, in_peft(variables, config_again))
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
