"""Weights of the base in PEFT's files: of adapted heads, of embeddings, of whole state dicts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import randlora_jax as rl
from randlora_jax import peft
from randlora_jax.linen import RandLora, quantize
from tests.peft_adapters import (
    GOLDEN,
    MLP,
    WEIGHTS,
    close,
    golden_base,
    golden_copy,
    load,
    rewrite,
    rewrite_config,
    same_trees,
)

PREFIX = "base_model.model."


class Tied(nn.Module):
    """Its output layer is its embedding."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 6, name="embed_tokens")
        return embed.attend(nn.Dense(6, use_bias=False, name="up_proj")(embed(tokens)))


class Untied(Tied):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 6, name="embed_tokens")(tokens)
        x = nn.Dense(6, use_bias=False, name="up_proj")(x)
        return nn.Dense(11, use_bias=False, name="lm_head")(x)


TOKENS = jnp.array([[1, 2, 3]])


def saved(folder, base, targets=("up_proj",), dtype=jnp.float32, **more):
    """(base variables, folder with an adapter as PEFT would write it, more of its tensors)."""
    params = base.init(jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    config = rl.RandLoraConfig(r=2, target_modules=list(targets))
    peft.save_adapter(folder, RandLora(base, config).adapt({"params": params}, TOKENS), config)
    put = {PREFIX + key.replace("__", "."): np.asarray(value) for key, value in more.items()}
    rewrite(folder, lambda tensors: tensors | put)
    return {"params": params}


def weights(base):
    """(embedding, output layer's weight as torch has it) of what `saved` makes."""
    params = base.init(jax.random.key(0), TOKENS)["params"]
    return params["embed_tokens"]["embedding"], params.get("lm_head", {}).get("kernel")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("wide", [True, False], ids=["in_float32", "in_its_dtype"])
def test_those_of_the_base_are_passed_over_with_a_word(tmp_path, dtype, wide):
    """As PEFT writes an adapted `lm_head`, and with `save_embedding_layers=True`."""
    embed, head = (w.astype(jnp.float32 if wide else dtype) for w in weights(Untied()))
    base = saved(
        tmp_path,
        Untied(),
        ("up_proj", "lm_head"),
        dtype,
        embed_tokens__weight=embed,
        lm_head__base_layer__weight=head.T,
    )
    with pytest.warns(UserWarning, match=r"'lm_head\.weight', equal to those here: passed over"):
        variables, config = peft.load_adapter(tmp_path, base)
    assert same_trees(variables["params"], base["params"])
    assert config.modules_to_save is None
    assert set(peft.module_names(tmp_path)) == {"embed_tokens", "lm_head", "up_proj"}


def test_others_take_their_place_and_train_on(tmp_path):
    embed, head = weights(Untied())
    base = saved(tmp_path, Untied(), embed_tokens__weight=embed + 1, lm_head__weight=head.T)
    with pytest.warns(UserWarning, match=r"modules_to_save=\['embed_tokens'\]"):
        variables, config = peft.load_adapter(tmp_path, base)
    assert (variables["params"]["embed_tokens"]["embedding"] == embed + 1).all()
    assert variables["params"]["lm_head"]["kernel"] is base["params"]["lm_head"]["kernel"]
    assert config.modules_to_save == ("embed_tokens",)
    rl.save_adapter(tmp_path / "ours", variables, config)
    again, _ = rl.load_adapter(tmp_path / "ours", base)
    assert same_trees(again, variables)
    peft.save_adapter(tmp_path / "theirs", variables, config)
    tensors = load_file(tmp_path / "theirs" / WEIGHTS)
    assert (tensors[PREFIX + "embed_tokens.weight"] == embed + 1).all()
    assert PREFIX + "lm_head.weight" not in tensors


def test_another_weight_under_an_adapter_is_told_to_be_kept(tmp_path):
    head = weights(Untied())[1].T + 1
    base = saved(tmp_path, Untied(), ("lm_head",), lm_head__base_layer__weight=head)
    with pytest.warns(UserWarning, match=r"Keep `params` too.*'lm_head\.weight'"):
        variables, config = peft.load_adapter(tmp_path, base)
    assert (variables["params"]["lm_head"]["kernel"] == head.T).all()
    assert config.modules_to_save is None and config.target_modules == ("lm_head",)


@pytest.mark.parametrize("change", [0, 1])
def test_a_shared_embedding_has_no_output_layer_of_its_own(tmp_path, change):
    """PEFT writes both of a tied pair."""
    embed = weights(Tied())[0] + change
    base = saved(tmp_path, Tied(), embed_tokens__weight=embed, lm_head__weight=embed)
    with pytest.warns(UserWarning) as told:
        variables, _ = peft.load_adapter(tmp_path, base)
    assert (variables["params"]["embed_tokens"]["embedding"] == embed).all()
    assert not any("no output layer is beside it" in str(w.message) for w in told)


def test_an_output_layer_that_a_shared_embedding_can_not_have(tmp_path):
    embed = weights(Tied())[0]
    base = saved(tmp_path, Tied(), embed_tokens__weight=embed, lm_head__weight=embed + 1)
    with pytest.raises(
        ValueError, match=r"'lm_head\.weight', but the base no.*nothing in the base"
    ):
        peft.load_adapter(tmp_path, base)


def test_training_a_shared_embedding_is_told_both_ways(tmp_path):
    embed = weights(Tied())[0]
    base = saved(tmp_path, Tied(), embed_tokens__weight=embed + 1)
    rewrite_config(tmp_path, modules_to_save=["embed_tokens"])
    with pytest.warns(UserWarning, match="'embed_tokens.embedding' is trained, and no output"):
        variables, config = peft.load_adapter(tmp_path, base)
    with pytest.warns(UserWarning, match="which trains a copy of it for the input alone"):
        peft.save_adapter(tmp_path / "a", variables, config)
    saved(tmp_path / "b", Untied(), embed_tokens__weight=weights(Untied())[0] + 1)
    rewrite_config(tmp_path / "b", modules_to_save=["embed_tokens"])
    peft.load_adapter(tmp_path / "b", Untied().init(jax.random.key(0), TOKENS))  # without a word


def test_weights_that_the_map_calls_otherwise_are_known_by_their_values(tmp_path):
    _, head = weights(Untied())
    base = saved(tmp_path, Untied(), lm_head__weight=head.T)
    name_map = {"up_proj": "up_proj"}
    with pytest.warns(UserWarning, match=r"'lm_head\.weight', equal to those here"):
        peft.load_adapter(tmp_path, base, name_map)
    rewrite(tmp_path, lambda t: t | {PREFIX + "lm_head.weight": np.asarray(head.T) + 1})
    with pytest.raises(ValueError, match=r"no place for 'lm_head'.*nothing in the base equals"):
        peft.load_adapter(tmp_path, base, name_map)


def test_over_codes_they_are_passed_over(tmp_path):
    _, head = weights(Untied())
    base = saved(tmp_path, Untied(), ("lm_head",), lm_head__base_layer__weight=head.T)
    codes = quantize(Untied(), base, TOKENS, qtype="int8")
    with pytest.warns(UserWarning, match="of which there are codes here"):
        variables, config = peft.load_adapter(tmp_path, codes)
    RandLora(Untied(), config).apply(variables, TOKENS)


class TestStateDicts:
    """`PeftModel.state_dict()`: the whole model, with the names of its adapters in the keys."""

    def raw(self, folder, name="default", golden="adapter_projection"):
        """The keys of a golden adapter as a state dict has them, with the base's weights."""
        base = golden_base(golden)[0]["params"]

        whole = ("lin2",) if golden == "adapter_bias_only" else ()  # by modules_to_save

        def change(tensors):
            raw = {}
            for key, value in tensors.items():
                at, leaf = key.rsplit(".", 1)
                own = leaf.startswith("randlora_")
                by_name = f"{at}.modules_to_save.{name}.{leaf}" if at[-4:] in whole else key
                raw[f"{key}.{name}" if own else by_name] = value
            for module, leaves in base.items():
                middle = "original_module" if module in whole else "base_layer"
                at = f"{PREFIX}{module}.{middle}"
                raw.setdefault(f"{at}.weight", np.asarray(leaves["kernel"]).T.copy())
                raw.setdefault(f"{at}.bias", np.asarray(leaves["bias"]))
            return raw

        rewrite(folder, change)

    @pytest.mark.parametrize("golden", ["adapter_projection", "adapter_bias_only"])
    @pytest.mark.parametrize("name", ["default", "chat"])
    def test_they_load_like_the_adapter(self, tmp_path, golden, name):
        folder = golden_copy(tmp_path, golden)
        expected, config = load(folder, name=golden)
        self.raw(folder, name, golden)
        with pytest.warns(UserWarning, match="equal to those here: passed over"):
            variables, its_config = load(folder, name=golden)
        assert same_trees(variables, expected) and its_config == config
        _, x, y, _ = golden_base(golden)
        assert close(RandLora(MLP(), config).apply(variables, x), y)

    def test_of_several_adapters_one_is_named(self, tmp_path):
        folder = golden_copy(tmp_path)
        (folder / "chat").mkdir()
        tensors = load_file(folder / WEIGHTS)
        both = {f"{k}.chat": v for k, v in tensors.items()}
        both |= {f"{k}.code": v + 1 if "lambda" in k else v for k, v in tensors.items()}
        save_file(both, folder / WEIGHTS)
        with pytest.raises(ValueError, match=r"adapters called \['chat', 'code'\]: adapter_name"):
            load(folder)
        for file in (WEIGHTS, "adapter_config.json"):
            (folder / file).rename(folder / "chat" / file)
        variables, _ = load(folder, adapter_name="chat")
        assert same_trees(variables, load(GOLDEN / "adapter_projection")[0])


@pytest.mark.parametrize("rows", [9, 12])
def test_a_vocabulary_that_was_resized_is_named_as_a_cause(tmp_path, rows):
    base = saved(tmp_path, Tied(), embed_tokens__weight=np.ones((rows, 6), np.float32))
    with pytest.raises(ValueError, match="a vocabulary that was resized"):
        peft.load_adapter(tmp_path, base)
