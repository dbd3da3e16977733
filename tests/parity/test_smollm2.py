"""examples/smollm2.py against transformers' Llama, both with the weights of the same GGUF file."""

import dialogues
import gguf_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2
import torch

from tests.parity import smollm2_models

PROMPTS = [
    "The capital of France is",
    gguf_weights.chat_prompt("Which planet is the hottest in the solar system?"),
    "def add(a, b):\n    return a + b\n\n\ndef multiply(a, b):\n",
]


@pytest.fixture(scope="module")
def llama():
    """(model, variables, tokenizer)"""
    model, params = smollm2_models.llama()
    return model, {"params": params}, smollm2_models.tokenizer()


@pytest.fixture(scope="module")
def end(llama):
    return llama[2].token_to_id("<|im_end|>")


def test_logits_are_those_of_transformers(llama):
    model, variables, tokenizer = llama
    theirs = smollm2_models.torch_llama().eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    apply = jax.jit(model.apply)
    for prompt in PROMPTS:
        tokens = np.array([tokenizer.encode(prompt).ids], np.int32)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
        logits = np.asarray(apply(variables, jnp.asarray(tokens)))
        assert logits.shape == expected.shape
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)


def test_parameters_are_those_of_the_model(llama):
    model, variables, _ = llama
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


def test_padding_on_the_right_changes_nothing(llama, end):
    model, variables, tokenizer = llama
    apply = jax.jit(model.apply)
    short = jnp.asarray([tokenizer.encode(PROMPTS[0]).ids], jnp.int32)
    padded = jnp.pad(short, ((0, 0), (0, 7)), constant_values=end)
    np.testing.assert_allclose(
        apply(variables, padded)[:, : short.shape[1]], apply(variables, short), rtol=0, atol=1e-3
    )


def test_the_capital_of_france_is_paris(llama, end):
    model, variables, tokenizer = llama
    ids = tokenizer.encode("The capital of France is").ids
    new = smollm2.generate(model.apply, variables, ids, 4, end)
    assert tokenizer.decode(new).startswith(" Paris")


def test_cached_generation_of_several_prompts_is_uncached_argmax_of_each(llama, end):
    model, variables, tokenizer = llama
    apply, count, expected = jax.jit(model.apply), 12, []
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    for prompt in prompts:
        tokens, length, new = np.full((1, 128), end, np.int32), len(prompt), []
        tokens[0, :length] = prompt
        while len(new) < count:
            best = int(jnp.argmax(apply(variables, tokens)[0, length + len(new) - 1]))
            if best == end:
                break
            tokens[0, length + len(new)] = best
            new.append(best)
        assert new
        expected.append(new)
    assert len({*map(len, prompts)}) > 1
    assert smollm2.generate_all(model.apply, variables, prompts, count, end) == expected
    assert smollm2.generate(model.apply, variables, prompts[0], count, end) == expected[0]


def test_tokens_are_those_of_transformers(llama):
    # Without numerals: from a GGUF file, transformers does not restore the splitting of digits.
    tokenizer = llama[2]
    theirs = smollm2_models.torch_tokenizer()
    for text in [
        *PROMPTS,
        "Hello world",
        "It's naïve, isn't it?  Café — 你好 🙂\n\n\tyes",
        "<|im_start|>user\nHi!<|im_end|>\n<|endoftext|>",
    ]:
        assert tokenizer.encode(text).ids == theirs(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("text", "ids"),  # the ids are llama.cpp's
    [
        (
            "In 1984,  12,345.67 people",
            [788, 216, 33, 41, 40, 36, 28, 256, 33, 34, 28, 35, 36, 37, 30, 38, 39, 701],
        ),
        ("a²b 3½ x10", [81, 19133, 82, 216, 35, 16738, 1792, 33, 32]),
    ],
)
def test_digits_are_tokens_of_their_own(llama, text, ids):
    tokenizer = llama[2]
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == text


def test_chat_prompt_is_the_template_of_the_file():
    theirs = smollm2_models.torch_tokenizer()
    messages = [{"role": "user", "content": "Who are you?"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert gguf_weights.chat_prompt("Who are you?") == expected


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.gguf"):
        gguf_weights.load(tmp_path / "absent.gguf")


def test_no_question_is_both_trained_on_and_held_out():
    train, held_out = dialogues.pairs()
    questions = [{dialogues.normalized(q) for q, _ in part} for part in (train, held_out)]
    assert len(train) > 500 and len(held_out) > 50
    assert not questions[0] & questions[1]
    assert dialogues.pairs() == (train, held_out)


def test_batches_depend_on_their_number_alone(llama):
    train, tokenizer = dialogues.pairs()[0], llama[2]
    through = dialogues.batches(train, tokenizer, 16, 96, seed=3)
    count = len(train) // 16 + 2  # into the second pass over the pairs
    first = [next(through) for _ in range(count)]
    resumed = next(dialogues.batches(train, tokenizer, 16, 96, seed=3, start=count - 1))
    for name, values in resumed.items():
        np.testing.assert_array_equal(values, first[-1][name])
    other = next(dialogues.batches(train, tokenizer, 16, 96, seed=4))
    assert not np.array_equal(other["tokens"], first[0]["tokens"])


def test_the_mask_covers_the_answer_and_its_end(llama, end):
    tokenizer = llama[2]
    pairs = [("Who are you?", "A robot."), ("Hello", "Hi")]
    (batch,) = dialogues.held_out_batches(pairs, tokenizer, 4, 64)
    assert [batch[name].shape for name in ("tokens", "targets", "mask")] == [(4, 64)] * 3
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    for row, (question, answer) in enumerate(pairs):
        learnt = batch["targets"][row][batch["mask"][row] > 0].tolist()
        assert learnt == [*tokenizer.encode(answer).ids, end]
        prompt = tokenizer.encode(gguf_weights.chat_prompt(question)).ids
        assert batch["tokens"][row, : len(prompt)].tolist() == prompt
    assert not batch["mask"][2:].any()
