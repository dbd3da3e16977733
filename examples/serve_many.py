"""Train an adapter for each topic in one batch, and answer for all of them in one batch.

python examples/serve_many.py                   # train, then serve and compare
python examples/serve_many.py --topics 3 --steps 2

A second run serves the adapters that the first has saved; --retrain makes new ones. "Switched" is
one adapter after another on the same table, "merged" a copy of the model for each adapter.
"""

import argparse
import functools
import pathlib
import statistics
import sys
import time

import dialogues
import gguf_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
import smollm2
from smollm2 import PROJECTIONS

import randlora_jax as rl
from randlora_jax.linen import RandLora

BASE = "__base__"


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topics", type=int, default=6, help="adapters, one for each topic")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=1, help="of each topic in a training batch")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--rank", type=int, default=64, help="rank of a basis; more is smaller")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="of each timing")
    parser.add_argument("--layers", type=int, default=30, help="the first of the model's")
    parser.add_argument("--retrain", action="store_true")
    parser.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path("outputs/serve"))
    return parser.parse_args(argv)


def train(args, llama, params, tokenizer, topics, folder):
    """Trains an adapter for each topic, all in each step, as if each were alone; saves them."""
    config = rl.RandLoraConfig(
        r=args.rank, randlora_alpha=20 * args.rank, target_modules=PROJECTIONS
    )
    configs = dict.fromkeys(topics, config)
    adapted = RandLora(llama, configs).adapt({"params": params}, jnp.zeros((1, 8), jnp.int32))
    variables, table = rl.adapters.table(adapted, configs, capacity=len(topics))
    model = RandLora(llama, table.config)
    trainable, frozen = rl.split(variables, table.config)
    warmup = max(1, args.steps // 8)
    rate = optax.warmup_cosine_decay_schedule(
        0, args.learning_rate, warmup, max(args.steps, warmup + 1), args.learning_rate / 10
    )
    tx = optax.adam(rate)  # no clipping by a norm across adapters
    ids = table.ids([topic for topic in topics for _ in range(args.rows)])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, opt_state, frozen, batch):
        def loss(trainable):
            variables = rl.combine(trainable, frozen)
            logits = model.apply(variables, batch["tokens"], adapter_ids=ids)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
            sums = [jnp.sum(a.reshape(len(topics), -1), 1) for a in (each * batch["mask"],
                                                                    batch["mask"])]  # fmt: skip
            means = sums[0] / jnp.maximum(sums[1], 1)
            return jnp.sum(means), means  # each adapter's own mean, and so its own gradient

        gradients, means = jax.grad(loss, has_aux=True)(trainable)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, means

    data = [dialogues.batches(pairs, tokenizer, args.rows, args.seq_len, 0)
            for pairs, _ in topics.values()]  # fmt: skip
    opt_state, losses, begun = tx.init(trainable), [], time.perf_counter()
    from rich.progress import track

    for _ in track(range(args.steps), "training"):
        parts = [next(batches) for batches in data]
        batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        trainable, opt_state, means = step(trainable, opt_state, frozen, batch)
        losses.append(np.asarray(means))
    seconds = time.perf_counter() - begun
    print(f"{len(topics)} adapters in one batch: {args.steps} steps, {seconds:.0f} s; loss of the "
          "first and of the last five steps:")  # fmt: skip
    for i, topic in enumerate(topics):
        first, last = (np.mean([m[i] for m in some]) for some in (losses[:5], losses[-5:]))
        print(f"  {topic:14} {first:.2f} -> {last:.2f}")
    variables = rl.combine(trainable, frozen)
    for topic in topics:
        rl.save_adapter(
            folder / topic, *rl.adapters.select(variables, table, topic), overwrite=True
        )


def load(params, topics, folder):
    """(variables, table) of the saved adapters, which come into it one after another."""
    base, table = {"params": params}, None
    for topic in topics:
        one, config = rl.load_adapter(folder / topic, base)
        if table is None:
            named = {**one, "randlora": {topic: one["randlora"]}}
            capacity = len(topics) + 2  # room for others, without a new compilation
            variables, table = rl.adapters.table(named, {topic: config}, capacity=capacity)
        else:
            variables, table = rl.adapters.insert(variables, table, topic, one, config)
    return variables, table


def ways(llama, variables, table, names):
    """Three functions of prompts, one for each name, that give the new ids of each."""
    model = RandLora(llama, table.config)
    merged = {}
    for name in dict.fromkeys(names):
        merged[name] = {"params": variables["params"]}
        if name != BASE:
            one, config = rl.adapters.select(variables, table, name)
            merged[name] = {"params": rl.merge(one, config)}

    def mixed(prompts, generate):
        return generate(model.apply, variables, prompts, adapter_ids=table.ids(names))

    def switched(prompts, generate):
        given = zip(prompts, names, strict=True)
        return [
            generate(model.apply, variables, [p], adapter_ids=table.ids(name))[0]
            for p, name in given
        ]

    def copies(prompts, generate):
        given = zip(prompts, names, strict=True)
        return [generate(llama.apply, merged[name], [p])[0] for p, name in given]

    def base(prompts, generate):
        return generate(llama.apply, merged[BASE], prompts)

    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6
    adapters = size(variables["randlora"]) + size(variables["randlora_bases"])
    held = size(variables["params"]) + adapters
    print(f"the table of {table.capacity} adapters and their bases: {adapters:.1f} MB")
    copied = len(merged) * size(variables["params"])
    return {"mixed": (mixed, held), "switched": (switched, held), "merged": (copies, copied),
            "base alone": (base, size(variables["params"]))}  # fmt: skip


def serve(args, llama, tokenizer, variables, table, topics):
    """Answers one question of each topic, in each way, and times it."""
    from rich.console import Console
    from rich.table import Table as Rich

    names = [*topics, BASE]
    questions = [(held_out or pairs)[0][0] for pairs, held_out in topics.values()]
    questions.append(questions[0])  # what the model without an adapter says to it
    prompts = [tokenizer.encode(gguf_weights.chat_prompt(q)).ids for q in questions]
    limits = args.new_tokens, tokenizer.token_to_id("<|im_end|>")
    answer = lambda apply, variables, prompts, **ids: smollm2.generate_all(
        apply, variables, prompts, *limits, **ids
    )
    never = llama.config.vocab_size - 1  # an end that no answer has, so that all are as long
    timed = lambda apply, variables, prompts, **ids: smollm2.generate_all(
        apply, variables, prompts, args.new_tokens, never, **ids
    )
    found, rows, rates = {}, Rich("way", "tokens/s", "over merged", "model and adapters"), {}
    compared = ways(llama, variables, table, names)
    for way, (run, _) in compared.items():
        found[way] = run(prompts, answer)
    times = {way: [] for way in compared}
    for turn in range(args.repeats + 1):
        for way, (run, _) in compared.items():
            begun = time.perf_counter()
            run(prompts, timed)
            if turn:  # the first compiles
                times[way].append(time.perf_counter() - begun)
    for way, seconds in times.items():
        rates[way] = len(names) * args.new_tokens / statistics.median(seconds)
    for way, (_, held) in compared.items():
        over = rates[way] / rates["merged"]
        rows.add_row(way, f"{rates[way]:.1f}", f"{over:.2f}", f"{held:.0f} MB")
    shown = Rich("adapter", "question", "answer", show_lines=True)
    for name, question, ids in zip(names, questions, found["mixed"], strict=True):
        shown.add_row(name, question, tokenizer.decode(ids).strip())
    console = Console(width=110)
    console.print(shown)
    console.print(rows)
    same = found["mixed"] == found["switched"]
    print(f"answers of the one batch: {'those of each adapter alone' if same else 'DIFFERENT'}")
    equal = sum(a == b for a, b in zip(found["mixed"], found["merged"], strict=True))
    print(f"and those of {equal} of {len(names)} merged models, which round otherwise")
    if not same:
        raise ValueError("a row of the batch does not answer as its adapter alone")


def main(argv=None):
    args = parse(argv)
    folder = args.output_dir.resolve()
    found = dialogues.by_topic()
    largest = sorted(found, key=lambda topic: -len(found[topic][0]))[: args.topics]
    topics = {topic: found[topic] for topic in sorted(largest)}
    sizes, params = smollm2.first_layers(*gguf_weights.load(), args.layers)
    llama, tokenizer = smollm2.Llama(sizes), gguf_weights.tokenizer()
    if args.retrain or not all((folder / topic).exists() for topic in topics):
        train(args, llama, params, tokenizer, topics, folder)
    variables, table = load(params, topics, folder)
    serve(args, llama, tokenizer, variables, table, topics)


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
