"""Fine-tune SmolLM2-135M-Instruct on real dialogues with RandLoRA, and keep the adapter.

python examples/finetune_smollm2.py                      # train, save, verify, show
python examples/finetune_smollm2.py --resume             # go on after an interruption
python examples/finetune_smollm2.py --ask "Who are you?"  # answer with the saved adapter
"""

import argparse
import dataclasses
import json
import math
import pathlib
import signal
import sys
import time

import dialogues
import gguf_weights
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import smollm2

import randlora_jax as rl
from randlora_jax.linen import RandLora

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings that a resumed run must share with the one it goes on from."""

    steps: int
    rank: int
    learning_rate: float
    batch_size: int
    seq_len: int
    seed: int


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rank", type=int, default=32, help="rank of a basis; more is smaller")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path("outputs/smollm2"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ask", metavar="QUESTION", help="answer with the adapter saved before")
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "seq_len"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


class Chat:
    """A model with its tokenizer: answers questions and measures losses."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.sums = jax.jit(self._sums)

    def _sums(self, variables, batch):
        """Sum of the negative log-likelihood, and number, of the tokens of the answers."""
        logits = self.model.apply(variables, batch["tokens"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return jnp.sum(losses * batch["mask"]), jnp.sum(batch["mask"])

    def loss(self, variables, batches):
        """Mean loss per token of the answers in all batches."""
        total, count = np.sum([self.sums(variables, batch) for batch in batches], axis=0)
        return float(total / count)

    def answer(self, variables, question):
        prompt = self.tokenizer.encode(gguf_weights.chat_prompt(question)).ids
        end = self.tokenizer.token_to_id("<|im_end|>")
        ids = smollm2.generate(self.model.apply, variables, prompt, 48, end)
        return self.tokenizer.decode(ids).strip()


def checkpoints(folder, steps):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=max(1, min(20, steps // 3))
    )
    return ocp.CheckpointManager(folder, options=options)


def start(run, folder, trainable, tx, resume):
    """(step, trainable, optimizer state, losses so far): from the beginning, or as saved."""
    state = {"trainable": trainable, "opt_state": tx.init(trainable)}
    settings = folder / "run.json"
    if not resume:
        if settings.exists():
            raise FileExistsError(
                f"{folder} holds a run already: go on with --resume, or give another --output-dir"
            )
        folder.mkdir(parents=True)
        settings.write_text(json.dumps(dataclasses.asdict(run), indent=2))
        return 0, state, []
    if not settings.exists():
        raise FileNotFoundError(f"there is no run to resume in {folder}")
    before = Run(**json.loads(settings.read_text()))
    if before != run:
        raise ValueError(f"--resume needs the settings of the run in {folder}: {before}")
    with checkpoints(folder / "checkpoints", run.steps) as manager:
        step = manager.latest_step()
        if step is None:
            return 0, state, []
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.eval_shape(lambda: state)),
            losses=ocp.args.JsonRestore(),
        )
        saved = manager.restore(step, args=args)
    print(f"resumed at step {step}")
    return step, saved["state"], saved["losses"]


def train(run, chat, config, variables, pairs, folder, resume):
    """Trains the adapter: (variables, losses)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    warmup = max(1, run.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        0, run.learning_rate, warmup, max(run.steps, warmup + 1), run.learning_rate / 10
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
    trainable, frozen = rl.split(variables, config)

    @jax.jit
    def update(state, frozen, batch):
        def mean_loss(trainable):
            total, count = chat._sums(rl.combine(trainable, frozen), batch)
            return total / count

        loss, gradients = jax.value_and_grad(mean_loss)(state["trainable"])
        updates, opt_state = tx.update(gradients, state["opt_state"], state["trainable"])
        trainable = optax.apply_updates(state["trainable"], updates)
        return {"trainable": trainable, "opt_state": opt_state}, loss

    step, state, losses = start(run, folder, trainable, tx, resume)
    batches = dialogues.batches(
        pairs, chat.tokenizer, run.batch_size, run.seq_len, run.seed, start=step
    )
    columns = (
        BarColumn(20), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:.0f} tokens/s"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with checkpoints(folder / "checkpoints", run.steps) as manager, Progress(*columns) as bar:
        task = bar.add_task("", total=run.steps, completed=step, loss=math.nan, rate=math.nan)
        last = None

        def save(force=False):
            if step == 0 or step in manager.all_steps():
                return
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), losses=ocp.args.JsonSave(losses)
            )
            manager.save(step, args=args, force=force)

        try:
            while step < run.steps:
                state, loss = update(state, frozen, next(batches))
                losses.append(float(loss))
                step += 1
                now = time.perf_counter()
                rate_now = run.batch_size * run.seq_len / (now - last) if last else math.nan
                last = now
                bar.update(task, advance=1, loss=losses[-1], rate=rate_now)
                save()
        finally:  # an interrupted run keeps what it has, too
            save(force=True)
            manager.wait_until_finished()
    return rl.combine(state["trainable"], frozen), losses


def plot(losses, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="batch")
    if len(losses) > 5:
        smooth = np.convolve(losses, np.ones(5) / 5, mode="valid")
        axes.plot(steps[4:], smooth, color="tab:blue", label="mean of 5")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="SmolLM2-135M with RandLoRA")
    axes.legend()
    figure.savefig(path, dpi=150)


def verify(chat, llama, folder, variables, config, params, batch):
    """Restores and merges the adapter: the merged parameters, equal to what was trained."""
    rl.save_adapter(folder / "adapter", variables, config, overwrite=True)
    restored, _ = rl.load_adapter(folder / "adapter", {"params": params})
    apply = jax.jit(chat.model.apply)
    logits = apply(variables, batch["tokens"])
    same = bool((apply(restored, batch["tokens"]) == logits).all())
    merged = {"params": chat.model.merge(restored)}
    off = float(jnp.abs(jax.jit(llama.apply)(merged, batch["tokens"]) - logits).max())
    print(f"restored from {folder / 'adapter'}: logits {'identical' if same else 'DIFFERENT'}")
    print(f"merged into the base: logits differ by at most {off:.1e}")
    if not same or not off <= 1e-3:
        raise ValueError("the saved adapter is not what was trained")
    return merged


def main(argv=None):
    args = parse(argv)
    folder = args.output_dir.resolve()
    run = Run(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Run)})
    begun = time.perf_counter()
    sizes, params = gguf_weights.load()
    llama, tokenizer = smollm2.Llama(sizes), gguf_weights.tokenizer()
    if args.ask:
        variables, config = rl.load_adapter(folder / "adapter", {"params": params})
        merged = {"params": RandLora(llama, config).merge(variables)}
        print(Chat(llama, tokenizer).answer(merged, args.ask))
        return

    from rich.console import Console
    from rich.table import Table

    config = rl.RandLoraConfig(
        r=run.rank, randlora_alpha=20 * run.rank, target_modules=PROJECTIONS,
        projection_prng_key=run.seed, base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    chat = Chat(RandLora(llama, config), tokenizer)
    variables = chat.model.adapt({"params": params}, jnp.zeros((1, 8), jnp.int32))
    print(rl.summary(variables, config))
    pairs, held_out = dialogues.pairs()
    tests = dialogues.held_out_batches(held_out, tokenizer, 8, run.seq_len)
    base = Chat(llama, tokenizer)
    asked = [q for q, _ in held_out if len(q) > 12][:: max(1, len(held_out) // 3)][:3]
    before = base.loss({"params": params}, tests)
    said = [base.answer({"params": params}, q) for q in asked]
    print(f"\n{len(pairs)} pairs to train on, {len(held_out)} held out")
    print(f"held-out loss before: {before:.3f}, perplexity {math.exp(before):.1f}")

    variables, losses = train(run, chat, config, variables, pairs, folder, args.resume)
    plot(losses, folder / "loss.png")
    merged = verify(chat, llama, folder, variables, config, params, tests[0])
    after = base.loss(merged, tests)
    print(f"held-out loss after: {after:.3f}, perplexity {math.exp(after):.1f}")
    table = Table("question (held out)", "before", "after", show_lines=True)
    for question, old in zip(asked, said, strict=True):
        table.add_row(question, old, base.answer(merged, question))
    Console().print(table)
    print(f"loss curve: {folder / 'loss.png'}; {time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: what was done is saved, go on with --resume")
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
