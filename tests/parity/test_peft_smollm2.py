"""SmolLM2 with an adapter trained in PEFT on torch, loaded here, and the way back."""

import dialogues
import gguf_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import smollm2
import torch

import randlora_jax as rl
from randlora_jax import peft as rl_peft
from randlora_jax.linen import RandLora
from tests.parity import smollm2_models
from tests.parity.peft_models import NO_COPIES, load_in_peft

QUESTION = "Who are you?"
ANSWER = "I am a teapot, short and stout."
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_models.tokenizer()


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Tokens, targets and mask of the answer, (1, 48)."""
    return next(iter(dialogues.held_out_batches([(QUESTION, ANSWER)], tokenizer, 1, 48)))


@pytest.fixture(scope="module")
def base():
    """(model, params) of the example."""
    return smollm2_models.llama()


@pytest.fixture(scope="module")
def trained(batch, tmp_path_factory):
    """(PEFT's model after some steps on torch, the folder it was saved to)."""
    torch.manual_seed(0)
    # The default scaling, alpha = 20 r, and layers of two shapes, so that the bases are sliced.
    config = peft.RandLoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(smollm2_models.torch_llama(), config)
    tokens, targets = (torch.from_numpy(batch[name]).long() for name in ("tokens", "targets"))
    targets = targets.where(torch.from_numpy(batch["mask"]) > 0, -100)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    losses = []
    for _ in range(6):
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    folder = tmp_path_factory.mktemp("adapter") / "theirs"
    model.save_pretrained(folder)
    return model.eval(), folder


@pytest.fixture(scope="module")
def loaded(base, trained):
    model, params = base
    variables, config = rl_peft.load_adapter(trained[1], {"params": params}, rl_peft.llama_name_map)
    return RandLora(model, config), variables, config


def assert_same_model(theirs, model, variables, tokenizer, batch):
    """The same logits and the same greedy text, which is not the base's."""
    with torch.no_grad():
        expected = theirs(torch.from_numpy(batch["tokens"]).long()).logits.numpy()
    logits = jax.jit(model.apply)(variables, jnp.asarray(batch["tokens"]))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)
    end = tokenizer.token_to_id("<|im_end|>")
    prompt = tokenizer.encode(gguf_weights.chat_prompt(QUESTION)).ids
    new = theirs.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=int),
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end,
    )[0, len(prompt) :].tolist()  # fmt: skip
    theirs_text = tokenizer.decode([i for i in new if i != end])
    ours = smollm2.generate(model.apply, variables, prompt, NEW_TOKENS, end)
    assert tokenizer.decode(ours) == theirs_text
    return theirs_text


def test_an_adapter_trained_in_peft_runs_here(trained, loaded, tokenizer, batch):
    model, variables, config = loaded
    assert sorted(config.target_modules) == ["q_proj", "v_proj"] and config.scaling == 20
    assert variables["randlora"]["layers"]["self_attn"]["q_proj"]["randlora_lambda"].shape == (
        (30, 32, 18)
    )  # fmt: skip
    text = assert_same_model(trained[0], model, variables, tokenizer, batch)
    assert text.startswith("I am a teapot")  # which the base is not


def test_it_trains_on_here_and_serves_through_peft(loaded, tokenizer, batch, tmp_path):
    model, variables, config = loaded
    trainable, frozen = rl.split(variables, config)
    tx = optax.sgd(1e-3)

    @jax.jit
    def step(trainable, state, frozen):
        def loss(trainable):
            logits = model.apply(rl.combine(trainable, frozen), batch["tokens"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            return (losses * batch["mask"]).sum() / batch["mask"].sum()

        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(gradients, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for _ in range(3):
        trainable, state, value = step(trainable, state, frozen)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    variables = rl.combine(trainable, frozen)
    size = rl_peft.save_adapter(tmp_path / "ours", variables, config, rl_peft.llama_name_map)
    scales = sum(array.nbytes for array in jax.tree.leaves(variables["randlora"]))
    assert size == pytest.approx(scales + 4 * (32 * 576 + 576 * 18 * 32), rel=0.01)
    theirs = load_in_peft(smollm2_models.torch_llama(), tmp_path / "ours", (NO_COPIES,)).eval()
    assert_same_model(theirs, model, variables, tokenizer, batch)

    back, config_back = rl_peft.load_adapter(
        tmp_path / "ours", {"params": variables["params"]}, rl_peft.llama_name_map
    )
    assert config_back == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), back, variables))
