"""What RandLoRA costs beside its rivals: operations as XLA counts them, and time, taking turns.

    python examples/benchmark.py                          # tables and a plot of step time
    python examples/benchmark.py --layers 2 --repeats 1 --tokens 1x64

Behind them comes what `rows.py` prints: decoding with an adapter for each row.

Step times are those of SmolLM2-135M (its first `--layers` layers) with all seven projections. Each
round runs every method once, so that a ratio compares runs of the same minute.
"""

import argparse
import dataclasses
import functools
import importlib.util
import os
import pathlib
import statistics
import sys
import time

import gguf_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rivals
import rows
import smollm2
from flax import linen as nn
from smollm2 import PROJECTIONS

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora, quantize
from randlora_jax.ops.costs import product_flops

REFERENCE = "full fine-tuning"
LORA_RANK = 16
QUANTISED = {"int8": {"qtype": "int8"}, "nf4": {"qtype": "nf4", "tile_size": 64}}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--tokens", nargs="+", default=["1x64", "8x256", "4x1024"],
                        metavar="BATCHxLENGTH")  # fmt: skip
    parser.add_argument("--rows", nargs="+", default=["1", "8", "32", "128"], help="for rows.py")
    parser.add_argument(
        "--output-dir", type=pathlib.Path, default=pathlib.Path("outputs/benchmark")
    )
    return parser.parse_args(argv)


def flops_table(rank=32):
    """Operations of value-and-grad over scales and input of one Dense, beside the two formulas."""
    found = []
    for tokens in (32, 256, 1024, 4096, 16384):
        for ins, outs in ((512, 512), (512, 2048), (2048, 512), (2048, 2048)):
            x = jax.ShapeDtypeStruct((tokens, ins), jnp.float32)
            dense = nn.Dense(outs, use_bias=False)
            config = rl.RandLoraConfig(r=rank, target_modules="all-linear")
            model = RandLora(dense, config)
            variables = jax.eval_shape(model.init, jax.random.key(0), x)
            trainable, frozen = rl.split(variables, config)
            params = {"params": variables["params"]}

            def adapted(trainable, x, frozen, model=model):
                return jnp.sum(model.apply(rl.combine(trainable, frozen), x))

            def plain(params, x, dense=dense):
                return jnp.sum(dense.apply(params, x))

            count = lambda f, *a: jax.jit(f).lower(*a).compile().cost_analysis()["flops"]
            ours = count(jax.value_and_grad(adapted, (0, 1)), trainable, x, frozen)
            full = count(jax.value_and_grad(plain, (0, 1)), params, x)
            base = count(jax.value_and_grad(plain, 1), params, x)
            m = -(-min(ins, outs) // rank) * rank
            ways = {
                "merged": sum(product_flops(tokens, ins, outs, m, "merged", "merged")),
                "factored": sum(product_flops(tokens, ins, outs, m, "factored", "factored")),
            }
            best = min(ways, key=ways.get)
            found.append((f"{tokens}", f"{ins} x {outs}", best, f"{ours / ways[best]:.3f}",
                         f"{ours / full:.2f}", f"{ours / base:.2f}"))  # fmt: skip
    return found


@dataclasses.dataclass
class Method:
    """A train step that is timed: `step()` runs one and waits for it."""

    name: str
    step: object


def loss_of(logits, tokens):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return jnp.mean(losses)


def jax_method(name, apply, trainable, frozen, tokens):
    """AdamW on `trainable`, whose tree `apply` puts together with `frozen`."""
    tx = optax.adamw(1e-4)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(trainable, opt_state, frozen):
        loss = lambda t: loss_of(apply(t, frozen, tokens), tokens)
        value, gradients = jax.value_and_grad(loss)(trainable)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    copied = jax.tree.map(jnp.array, trainable)
    state = [copied, tx.init(copied)]

    def step():
        *state[:], value = update(*state, frozen)
        return float(value)

    return Method(name, step)


def methods(config, params, tokens, rank):
    """All methods that are installed, for one batch."""
    llama = smollm2.Llama(config)
    plain = lambda p, frozen, t: llama.apply({"params": p}, t)
    yield jax_method(REFERENCE, plain, params, {}, tokens)
    # The frozen base, as an adapter meets it: gradients reach the first layer, but no kernel.
    key = "input_layernorm"
    first = {"layers": {key: params["layers"][key]}}
    rest = trees.filtered(params, lambda path, _: key not in path)
    apply = lambda t, f, x: llama.apply({"params": trees.union(f, t)}, x)
    yield jax_method("frozen base", apply, first, rest, tokens)
    for strategy in ("auto", "merged", "factored"):
        yield randlora_method(strategy, llama, params, tokens, rank, strategy)
    yield randlora_method("sparse, int8", llama, params, tokens, rank, sparse=True)
    if importlib.util.find_spec("qwix"):
        yield qwix_method(f"LoRA (qwix, rank {LORA_RANK})", llama, params, tokens)
        for qtype, how in QUANTISED.items():
            base = {"params": params}
            quantised = quantize(llama, base, tokens, target_modules=PROJECTIONS, **how)["params"]
            name = f"on {qtype}"
            yield randlora_method(name, llama, quantised, tokens, rank)
            yield qwix_method(f"QLoRA (qwix) {name}", llama, quantised, tokens, **how)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("peft"):
        yield peft_method(config, tokens, rank)


def randlora_method(name, llama, params, tokens, rank, strategy="auto", **bases):
    """Ours, over whatever base the parameters are."""
    adapter = rl.RandLoraConfig(
        r=rank, randlora_alpha=20 * rank, target_modules=PROJECTIONS, **bases
    )
    model = RandLora(llama, adapter, strategy=strategy)
    trainable, frozen = rl.split(model.adapt({"params": params}, tokens), adapter)
    apply = lambda t, f, x: model.apply(rl.combine(t, f), x)
    return jax_method(f"RandLoRA {name}", apply, trainable, frozen, tokens)


def qwix_method(name, llama, params, tokens, rank=LORA_RANK, qtype=None, tile_size=None):
    """LoRA through qwix, the peer that JAX users have; QLoRA over quantised parameters."""
    how = {"weight_qtype": qtype, "tile_size": tile_size} if qtype else {}
    model, factors, frozen = rivals.qwix_lora(llama, params, tokens, rank, **how)
    apply = lambda t, f, x: model.apply({"params": rl.combine(t, f)}, x)
    return jax_method(name, apply, factors(0), frozen, tokens)


def peft_method(config, tokens, rank):
    """PEFT's RandLoRA on torch, with the same sizes and random weights."""
    import peft
    import torch
    import transformers

    sizes = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    torch.set_num_threads(os.cpu_count())
    model = transformers.LlamaForCausalLM(sizes)
    model = peft.get_peft_model(model, peft.RandLoraConfig(
        r=rank, randlora_alpha=20 * rank, target_modules=PROJECTIONS))  # fmt: skip
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()  # as the Flax model does
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    batch = torch.from_numpy(np.array(tokens)).long()

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return Method("RandLoRA (PEFT)", step)


def timed(methods, repeats):
    """{method: seconds of each round}, after one round that is not counted."""
    times = {method.name: [] for method in methods}
    for turn in range(repeats + 1):
        for method in methods:
            begun = time.perf_counter()
            method.step()
            if turn:
                times[method.name].append(time.perf_counter() - begun)
    return times


def ratios(times, rival):
    """ "median (lowest to highest)" of time over the rival's in the same round."""
    each = [a / b for a, b in zip(times, rival, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    names = list(next(iter(results.values())))
    counts = sorted(results)
    for name in names:
        axes.plot(counts, [statistics.median(results[n][name]) / n * 1e3 for n in counts],
                  marker="o", label=name)  # fmt: skip
    merged, factored = ([statistics.median(results[n][f"RandLoRA {way}"]) for n in counts]
                        for way in ("merged", "factored"))  # fmt: skip
    for left, right, a, b in zip(counts, counts[1:], range(len(counts)), range(1, len(counts)),
                                 strict=False):  # fmt: skip
        before, after = np.log(merged[a] / factored[a]), np.log(merged[b] / factored[b])
        if before > 0 >= after:
            at = np.exp(np.interp(0, [-before, -after], np.log([left, right])))
            axes.axvline(at, color="0.7", linestyle=":")
            axes.annotate(f"merged wins from {at:.0f}", (at, axes.get_ylim()[1]), rotation=90,
                          va="top", ha="right", fontsize=8)  # fmt: skip
    axes.set(xscale="log", xlabel="tokens in a step", ylabel="milliseconds per token")
    axes.set_title("Train step of SmolLM2-135M, all projections")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv=None):
    from rich.console import Console
    from rich.table import Table

    args, console = parse(argv), Console(width=130)
    table = Table("tokens", "in x out", "cheaper formula", "over it", "over full", "over frozen",
                  title="Operations of one adapted Dense, value and grad")  # fmt: skip
    for row in flops_table(args.rank):
        table.add_row(*row)
    console.print(table)
    config, params = smollm2.first_layers(*gguf_weights.load(), args.layers)
    results = {}
    for shape in args.tokens:
        batch, length = (int(n) for n in shape.split("x"))
        tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, config.vocab_size)
        times = timed(list(methods(config, params, tokens, args.rank)), args.repeats)
        results[batch * length] = times
        others = (REFERENCE, "frozen base", "QLoRA (qwix) on nf4", "RandLoRA (PEFT)")
        others = [name for name in others if name in times]
        title = f"Train step, {batch} x {length} tokens, {args.layers} layers"
        table = Table("method", "seconds", *(f"over {name}" for name in others), title=title)
        for name, seconds in times.items():
            over = (ratios(seconds, times[other]) for other in others)
            table.add_row(name, f"{statistics.median(seconds):.2f}", *over)
        console.print(table)
    plot(results, args.output_dir / "step_time.png")
    console.print(f"jax {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores; "
                  f"plot: {args.output_dir / 'step_time.png'}")  # fmt: skip
    of_rows = ("--rows", *args.rows, "--repeats", str(args.repeats))
    rows.main([*of_rows, "--output-dir", str(args.output_dir)])


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
