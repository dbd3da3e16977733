"""Fine-tune SmolLM2-135M-Instruct with tunix's own model and trainer, and RandLoRA.

python examples/tunix_sft.py             # train, keep the adapter, show what it changed
python examples/tunix_sft.py --steps 60  # to where an interrupted run, or a shorter one, goes on

tunix is installed by `pip install -e ".[examples,tunix]"`.
"""

import argparse
import itertools
import math
import pathlib
import sys

import dialogues
import gguf_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.nnx import inject, merge, variables

BATCH, LENGTH = 8, 64


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layers", type=int, help="fewer than all, to try it out")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path("outputs/tunix"))
    return parser.parse_args(argv)


def load(layers=None):
    """SmolLM2 as tunix has it: a Qwen 2 whose biases are zero; its Llama has one rope_theta."""
    from tunix.models.qwen2 import model as qwen2

    sizes, params = gguf_weights.load()
    config = qwen2.ModelConfig(
        num_layers=layers or sizes.layers, vocab_size=sizes.vocab_size,
        embed_dim=sizes.hidden_size, hidden_dim=sizes.ffn_size, num_heads=sizes.heads,
        head_dim=sizes.head_size, num_kv_heads=sizes.kv_heads, rope_theta=int(sizes.rope_theta),
        norm_eps=sizes.norm_eps, use_tied_embedding=True,
    )  # fmt: skip
    model = nnx.eval_shape(lambda: qwen2.Qwen2(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        weight = _weight(params, *path)
        shape, dtype = variable.shape, variable.dtype
        variable.set_value(jnp.zeros(shape, dtype) if weight is None else weight.reshape(shape))
    nnx.update(model, state)
    return model


def _weight(params, part, *rest):
    """The weight at a place in tunix's tree, in SmolLM2's own, where layers are stacked."""
    if part == "embedder":
        return params["embed_tokens"]["embedding"]
    if part == "final_norm":
        return params["norm"]["scale"]
    number, *names, last = rest
    if last.endswith("_bias"):
        return None
    names = ["self_attn" if name == "attn" else name for name in names]
    node = trees.get(params["layers"], tuple(names))
    return node.get("kernel", node.get("scale"))[number]


def inputs(batch):
    """What tunix's loss takes, of a batch of `dialogues`: answers count, padding is at the end."""
    tokens = jnp.concatenate([batch["tokens"], batch["targets"][:, -1:]], 1)
    mask = jnp.concatenate([jnp.zeros_like(batch["mask"][:, :1]), batch["mask"]], 1)
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return {
        "input_tokens": tokens,
        "input_mask": mask,
        "positions": jnp.broadcast_to(jnp.arange(length), tokens.shape),
        "attention_mask": jnp.broadcast_to(causal, (len(tokens), length, length)),
    }


def main(argv=None):
    from tunix.sft import peft_trainer

    args = parse(argv)
    folder = args.output_dir.resolve()
    model, tokenizer = load(args.layers), gguf_weights.tokenizer()
    pairs, held_out = dialogues.pairs()
    tests = dialogues.held_out_batches(held_out, tokenizer, BATCH, LENGTH)
    config = rl.RandLoraConfig(
        r=args.rank, randlora_alpha=20 * args.rank, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    inject(model, config)
    rl.pin_adapter(folder / "steps", variables(model), config)  # a resumed run must have the same
    options = peft_trainer.TrainingConfig(
        eval_every_n_steps=10**9,
        max_steps=args.steps,
        checkpoint_root_directory=str(folder / "steps"),
    )
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(args.learning_rate), options)
    trainer = trainer.with_gen_model_input_fn(inputs)

    @nnx.jit
    def loss(model, batch):
        return peft_trainer._default_loss_fn(model, **inputs(batch)) * jnp.sum(batch["mask"])

    def held_out_loss():
        return float(sum(loss(model, b) for b in tests) / sum(b["mask"].sum() for b in tests))

    shapes = jax.tree.leaves(variables(model)["randlora"])
    print(f"{sum(a.size for a in shapes):,} trainable parameters, from step {trainer.train_steps}")
    before = held_out_loss()
    print(f"held-out loss before: {before:.3f}, perplexity {math.exp(before):.1f}")
    train = dialogues.batches(pairs, tokenizer, BATCH, LENGTH, seed=0)
    trainer.train(itertools.islice(train, args.steps))  # it passes over what it has seen
    trainer.close()
    after = held_out_loss()
    print(f"held-out loss after: {after:.3f}, perplexity {math.exp(after):.1f}")
    rl.save_adapter(folder / "adapter", variables(model), config, overwrite=True)
    batch = inputs(tests[0])
    given = batch["input_tokens"], batch["positions"], None, batch["attention_mask"]
    logits = model(*given)[0]
    off = float(np.abs(merge(model)(*given)[0] - logits).max())
    print(f"{folder / 'adapter'}: merged into the base, logits differ by at most {off:.1e}")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
