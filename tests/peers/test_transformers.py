"""The Flax models of transformers 4, unmodified, beside the same in torch with PEFT's adapters."""

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers as hf

import randlora_jax as rl
from randlora_jax.linen import RandLora
from tests.linen_cases import randomised

SMALL = dict(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=24)
TOKENS = np.random.default_rng(0).integers(1, 32, (2, 5))
IMAGES = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
# name: (config, class in torch, inputs, names of its linear layers, map)
LLAMA = dict(**SMALL, num_key_value_heads=2, vocab_size=32, max_position_embeddings=16)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {
    "Llama": (hf.LlamaConfig(**LLAMA), "LlamaForCausalLM", {"input_ids": TOKENS}, SEVEN, None),
    "Mistral": (
        hf.MistralConfig(**LLAMA), "MistralForCausalLM", {"input_ids": TOKENS}, SEVEN, None,
    ),
    "Gemma": (
        hf.GemmaConfig(**LLAMA, head_dim=8), "GemmaForCausalLM", {"input_ids": TOKENS}, SEVEN, None,
    ),
    "GPT-2": (
        hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16),
        "GPT2LMHeadModel", {"input_ids": TOKENS}, ["c_attn", "c_proj", "c_fc"],
        rl.peft.gpt2_name_map,
    ),
    "BERT": (
        hf.BertConfig(**SMALL, vocab_size=32), "BertModel", {"input_ids": TOKENS},
        ["query", "key", "value", "dense"], None,
    ),
    "ViT": (
        hf.ViTConfig(**SMALL, image_size=8, patch_size=4), "ViTModel", {"pixel_values": IMAGES},
        ["query", "key", "value", "dense"], None,
    ),
    "T5": (
        hf.T5Config(
            num_layers=2, d_model=16, d_kv=8, d_ff=24, num_heads=2, vocab_size=32,
            decoder_start_token_id=0,
        ),
        "T5ForConditionalGeneration", {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]},
        ["q", "k", "v", "o", "wi", "wo"], None,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _older_jax(monkeypatch):
    # What T5 calls of jax.numpy has another name by now.
    clip = jnp.clip
    renamed = lambda x, a_max: clip(x, max=a_max)
    monkeypatch.setattr(
        jnp, "clip", lambda *args, **kw: (renamed if "a_max" in kw else clip)(*args, **kw)
    )


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    """PEFT's model, the Flax model with its weights, the inputs, the map, the adapter's folder."""
    config, name, inputs, layers, name_map = MODELS[request.param]
    torch.manual_seed(0)
    base = getattr(hf, name)(config).eval()
    base.save_pretrained(tmp_path / "base")
    model = getattr(hf, "Flax" + name).from_pretrained(tmp_path / "base", from_pt=True)
    theirs = peft.get_peft_model(base, peft.RandLoraConfig(r=3, target_modules=layers)).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) / 4
    theirs.save_pretrained(tmp_path / "adapter")
    return theirs, model, inputs, name_map, tmp_path


def of_torch(model, inputs):
    with torch.no_grad():
        return model(**{name: torch.tensor(value) for name, value in inputs.items()})[0].numpy()


def test_an_adapter_of_peft_moves_both_ways(case):
    theirs, model, inputs, name_map, folder = case
    expected = of_torch(theirs, inputs)
    with theirs.disable_adapter():
        base = of_torch(theirs, inputs)
    close = dict(atol=2e-5 * np.abs(expected).max(), rtol=0)
    np.testing.assert_allclose(model(**inputs)[0], base, **close)
    assert np.abs(expected - base).max() > 1e-2 * np.abs(expected).max()

    variables, config = rl.peft.load_adapter(folder / "adapter", {"params": model.params}, name_map)
    merged = model(**inputs, params=rl.merge(variables, config))[0]
    np.testing.assert_allclose(merged, expected, **close)

    scales = randomised(variables["randlora"])
    rl.peft.save_adapter(folder / "ours", {**variables, "randlora": scales}, config, name_map)
    read = peft.PeftModel.from_pretrained(theirs.unload(), folder / "ours").eval()
    params = rl.merge({**variables, "randlora": scales}, config)
    np.testing.assert_allclose(model(**inputs, params=params)[0], of_torch(read, inputs), **close)


class Adapted:
    """In place of a Flax model's module: runs it with an adapter."""

    def __init__(self, module, variables):
        self.module, self.variables = module, variables

    def apply(self, variables, *args, **kwargs):
        return self.module.apply({**self.variables, "params": variables["params"]}, *args, **kwargs)


def test_every_linear_layer_is_known_and_applying_is_merging(case):
    _, model, inputs, name_map, folder = case
    variables, config = rl.peft.load_adapter(folder / "adapter", {"params": model.params}, name_map)
    merged = np.asarray(model(**inputs, params=rl.merge(variables, config))[0])
    paths = {path[:-1] for path, _ in rl.trees.items(variables["randlora"])}
    base, calls = model.module, []

    class Seen:
        def apply(self, given, *args, **kwargs):
            calls.append((args, kwargs))
            return base.apply(given, *args, **kwargs)

    model._module = Seen()
    model(**inputs)
    (args, kwargs), adapted = calls[0], RandLora(base, config.replace(target_modules="all-linear"))
    taken = {k: v for k, v in kwargs.items() if k not in ("rngs", "mutable", "method")}
    made = adapted.adapt({"params": model.params}, *args, **taken)
    found = {path[:-1] for path, _ in rl.trees.items(made["randlora"])}
    assert found - {("lm_head",)} == paths

    model._module = Adapted(RandLora(base, config), variables)
    y = np.asarray(model(**inputs)[0])
    np.testing.assert_allclose(y, merged, atol=2e-5 * np.abs(merged).max(), rtol=0)
