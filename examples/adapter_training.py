"""The training loop of the example: batches in, checkpoints on the way, an adapter out."""

import dataclasses
import json
import math
import time

import dialogues
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import randlora_jax as rl


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings that a resumed run must share with the one it goes on from."""

    steps: int
    rank: int
    learning_rate: float
    batch_size: int
    seq_len: int
    seed: int
    quantize: str | None = None


def sums(logits, batch):
    """Sum of the negative log-likelihood, and number, of the tokens of the answers."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(losses * batch["mask"]), jnp.sum(batch["mask"])


def optimizer(steps, learning_rate):
    """AdamW, clipped, with warm-up and decay to a tenth."""
    warmup = max(1, steps // 10)
    rate = optax.warmup_cosine_decay_schedule(
        0, learning_rate, warmup, max(steps, warmup + 1), learning_rate / 10
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))


def checkpoints(folder, steps):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=max(1, min(20, steps // 3))
    )
    return ocp.CheckpointManager(folder / "checkpoints", options=options)


def begin(run, folder, resume):
    """Checks that the folder is free, or with `resume` that it holds this run, before any work."""
    settings = folder / "run.json"
    if not resume:
        if settings.exists():
            raise FileExistsError(
                f"{folder} holds a run already: go on with --resume, or give another --output-dir"
            )
        multihost_utils.sync_global_devices("every process has looked")
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            settings.write_text(json.dumps(dataclasses.asdict(run), indent=2))
        return
    if not settings.exists():
        raise FileNotFoundError(f"there is no run to resume in {folder}")
    before = json.loads(settings.read_text())
    if before != dataclasses.asdict(run):
        raise ValueError(f"--resume needs the settings of the run in {folder}: {before}")


def restore(manager, variables, opt_state):
    """(step, variables, optimizer state, losses so far) as saved last, or from the beginning."""
    step = manager.latest_step()
    if step is None:
        return 0, variables, opt_state, []
    base = {"params": variables["params"]}
    args = ocp.args.Composite(
        adapter=rl.AdapterRestore(base),
        opt_state=ocp.args.StandardRestore(
            jax.tree.map(ocp.utils.to_shape_dtype_struct, opt_state)
        ),
        losses=ocp.args.JsonRestore(),
    )
    saved = manager.restore(step, args=args)
    print(f"resumed at step {step}")
    return step, saved.adapter[0], saved.opt_state, saved.losses


def train(run, model, tokenizer, config, variables, pairs, folder, mesh=None):
    """Trains the adapter, from its last checkpoint if there is one: (variables, losses)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    tx = optimizer(run.steps, run.learning_rate)
    trainable, frozen = rl.split(variables, config)

    @jax.jit
    def update(trainable, opt_state, frozen, batch):
        def mean_loss(trainable):
            logits = model.apply(rl.combine(trainable, frozen), batch["tokens"])
            total, count = sums(logits, batch)
            return total / jnp.maximum(count, 1)

        loss, gradients = jax.value_and_grad(mean_loss)(trainable)
        updates, opt_state = tx.update(gradients, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    columns = (
        BarColumn(20), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[rate]:.0f} tokens/s"), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with checkpoints(folder, run.steps) as manager:
        start = meshes.put(tx.init(trainable), mesh)
        step, variables, opt_state, losses = restore(manager, variables, start)
        if mesh is not None:
            places = rl.sharding(variables, config, mesh, data_axes=["data"])
            variables = jax.device_put(variables, places)
        trainable, frozen = rl.split(variables, config)
        batches = dialogues.batches(
            pairs, tokenizer, run.batch_size, run.seq_len, run.seed, start=step
        )

        def save(force=False):
            if step == 0 or step in manager.all_steps():
                return
            args = ocp.args.Composite(
                adapter=rl.AdapterSave(rl.combine(trainable, frozen), config),
                opt_state=ocp.args.StandardSave(opt_state),
                losses=ocp.args.JsonSave(losses),
            )
            if force or manager.should_save(step):
                manager.save(step, args=args, force=force)

        with Progress(*columns, disable=jax.process_index() > 0) as bar:
            task = bar.add_task("", total=run.steps, completed=step, loss=math.nan, rate=math.nan)
            last = None
            try:
                while step < run.steps:
                    batch = meshes.put(next(batches), mesh, "data")
                    trainable, opt_state, loss = update(trainable, opt_state, frozen, batch)
                    losses.append(float(loss))
                    step += 1
                    now = time.perf_counter()
                    rate = run.batch_size * run.seq_len / (now - last) if last else math.nan
                    last = now
                    bar.update(task, advance=1, loss=losses[-1], rate=rate)
                    save()
            finally:  # an interrupted run keeps what it has, too
                save(force=True)
                manager.wait_until_finished()
    return rl.combine(trainable, frozen), losses


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
