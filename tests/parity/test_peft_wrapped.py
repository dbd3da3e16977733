"""Bases that are wrapped: compiled, with a head for a task, within a larger model."""

import json
import warnings

import peft
import pytest
import torch
import transformers
from safetensors import safe_open

from randlora_jax import peft as rl_peft
from tests.parity.peft_models import load_in_peft
from tests.parity.test_peft_layouts import TOKENS, assert_merged, llama, of_ours, params_of
from tests.peft_adapters import same_trees


def classifier():
    torch.manual_seed(1)
    sizes = llama().config.to_dict() | {"num_labels": 3, "pad_token_id": 0}
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes)).eval()


def test_a_head_for_a_task_goes_to_peft_and_is_missed_without(tmp_path):
    variables, config = of_ours(params_of(classifier()))
    config = config.replace(task_type="SEQ_CLS", modules_to_save=["score"])
    head = variables["params"]["score"]
    head["kernel"] = head["kernel"] + 1
    save = lambda folder, config, **more: rl_peft.save_adapter(
        tmp_path / folder, variables, config, rl_peft.llama_name_map, layout="copies"
    )
    save("whole", config)
    model = load_in_peft(classifier(), tmp_path / "whole")
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    assert_merged(model, variables, config)
    # What we refuse, PEFT can't read: if it can one day, the refusal goes.
    with pytest.raises(ValueError, match="put 'score' into modules_to_save"):
        save("without", config.replace(modules_to_save=None))
    save("without", config.replace(modules_to_save=None, task_type=None))
    path = tmp_path / "without" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
    with pytest.raises(KeyError, match="score"):
        peft.PeftModel.from_pretrained(classifier(), tmp_path / "without")


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_trained_on_a_compiled_base(tmp_path, whole):
    base = llama()
    params = params_of(base)
    config = peft.RandLoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    if whole:
        model = peft.get_peft_model(torch.compile(base), config)
    else:  # block by block, as large models are
        for i, layer in enumerate(base.model.layers):
            base.model.layers[i] = torch.compile(layer)
        model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    assert "_orig_mod" in str(keys_in(tmp_path))
    variables, found = rl_peft.load_adapter(tmp_path, {"params": params}, rl_peft.llama_name_map)
    rl_peft.save_adapter(tmp_path / "ours", variables, found, rl_peft.llama_name_map)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    theirs = [p for n, p in model.named_parameters() if "randlora_" in n]
    ours = [p for n, p in again.named_parameters() if "randlora_" in n]
    assert len(theirs) == len(ours) == 8
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert_merged(again, variables, found)


def keys_in(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


class Seeing(torch.nn.Module):
    """A language model within another one, where transformers 5 has it."""

    def __init__(self):
        super().__init__()
        whole = llama()
        self.config, self.model = whole.config, torch.nn.Module()
        self.model.language_model, self.lm_head = whole.model, whole.lm_head

    def forward(self, input_ids):
        return self.lm_head(self.model.language_model(input_ids).last_hidden_state)


def test_a_language_model_within_another(tmp_path):
    params = params_of(llama())
    inner = rl_peft.llama_name_map.moved("model", "model.language_model")
    variables, config = of_ours(params)
    rl_peft.save_adapter(tmp_path / "a", variables, config, inner, layout="copies")
    model = load_in_peft(Seeing(), tmp_path / "a")
    alone = tmp_path / "b"
    rl_peft.save_adapter(alone, variables, config, rl_peft.llama_name_map, layout="copies")
    expected = load_in_peft(llama(), alone)(TOKENS).logits
    assert torch.equal(model(input_ids=TOKENS), expected)
    model.save_pretrained(tmp_path / "c")
    again, _ = rl_peft.load_adapter(tmp_path / "c", {"params": params}, inner)
    assert same_trees(again["randlora"], variables["randlora"])
    with pytest.raises(ValueError, match=r"\.moved\('model', 'model\.language_model'\)"):
        rl_peft.load_adapter(tmp_path / "c", {"params": params}, rl_peft.llama_name_map)
