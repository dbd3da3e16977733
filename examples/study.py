"""Runs of a comparison: trained, tuned on a validation part, and kept, so that it can go on."""

import dataclasses
import json
import os
import re

import adapter_training
import benchmark
import dialogues
import jax
import jax.numpy as jnp
import numpy as np
import optax
import spectra

RATES = [float(f"{digit}e{exponent}") for exponent in range(-7, 1) for digit in (1, 3)]
RANK_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all runs of a comparison share, and one that goes on must keep."""

    steps: int
    batch_size: int
    seq_len: int
    evaluations: int
    layers: int
    device: str


def begin(folder, settings):
    """Makes the folder, or finds it to hold runs of the same settings."""
    path = folder / "settings.json"
    mine = dataclasses.asdict(settings)
    if path.exists() and (theirs := json.loads(path.read_text())) != mine:
        changed = ", ".join(f"{k}={theirs.get(k)!r}" for k in mine if theirs.get(k) != mine[k])
        raise ValueError(f"{folder} holds runs with {changed}: give another --output-dir")
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(mine).encode())


def write(path, data):
    """All of a file or nothing, so that an interrupted comparison leaves no half of a run."""
    part = path.with_suffix(f".{os.getpid()}")
    part.write_bytes(data)
    part.replace(path)


class Trainer:
    """One way to train, compiled once for all learning rates and seeds."""

    def __init__(self, rival, settings):
        self.rival, self.settings = rival, settings
        self.tx = adapter_training.optimizer(settings.steps, 1.0)  # times each run's own rate
        self.update = jax.jit(self._update, donate_argnums=(0, 1))
        self.sums = jax.jit(self._sums)

    def _sums(self, trainable, frozen, batch):
        return adapter_training.sums(self.rival.apply(trainable, frozen, batch["tokens"]), batch)

    def _update(self, trainable, opt_state, frozen, batch, rate):
        def mean(trainable):
            total, count = self._sums(trainable, frozen, batch)
            return total / jnp.maximum(count, 1)

        loss, gradients = jax.value_and_grad(mean)(trainable)
        updates, opt_state = self.tx.update(gradients, opt_state, trainable)
        updates = jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)
        return optax.apply_updates(trainable, updates), opt_state, loss

    def start(self, seed):
        """(trainable, optimizer state, frozen), of which the first two may be donated."""
        trainable, frozen = self.rival.start(seed)
        trainable = jax.tree.map(jnp.array, trainable)
        return trainable, self.tx.init(trainable), frozen

    def loss(self, trainable, frozen, batches):
        """Mean loss for a token of the answers in all batches, in nats."""
        parts = [self.sums(trainable, frozen, batch) for batch in batches]
        total, count = np.sum(parts, axis=0)
        return float(total / count)

    def stepper(self, batch):
        """(function that makes a step, the bytes that it needs at most, as XLA plans it)."""
        rate, (*state, frozen) = np.float32(0), self.start(0)
        step = self.update.lower(*state, frozen, batch, rate).compile()
        found = step.memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes

        def once():
            *state[:], loss = step(*state, frozen, batch, rate)
            return float(loss)

        return once, held + found.temp_size_in_bytes - found.alias_size_in_bytes


class Study:
    """All runs of a comparison in a folder.

    `data` has "train", pairs, and batches of "validation" and "held_out".
    """

    def __init__(self, folder, settings, tokenizer, data, advance=lambda steps, text: None):
        self.folder, self.settings, self.data = folder, settings, data
        self.tokenizer, self.advance = tokenizer, advance
        self.trainer = None
        begin(folder, settings)

    def path(self, name, rate, seed):
        slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
        return self.folder / "runs" / f"{slug}_{rate:g}_{seed}.json"

    def trainer_of(self, rival):
        if self.trainer is None or self.trainer.rival is not rival:
            self.trainer = Trainer(rival, self.settings)
        return self.trainer

    def run(self, rival, rate, seed):
        """The record of a run, which is trained if it is not there."""
        path = self.path(rival.name, rate, seed)
        if not path.exists():
            record, values = self.train(self.trainer_of(rival), rate, seed)
            if values:
                with path.with_suffix(".npz").open("wb") as file:
                    np.savez_compressed(file, **values)
            write(path, json.dumps(record).encode())
        else:
            self.advance(self.settings.steps, None)
        return json.loads(path.read_text())

    def train(self, trainer, rate, seed):
        s, rival = self.settings, trainer.rival
        trainable, opt_state, frozen = trainer.start(seed)
        batches = dialogues.batches(
            self.data["train"], self.tokenizer, s.batch_size, s.seq_len, seed
        )
        marks = {round(s.steps * (i + 1) / s.evaluations) for i in range(s.evaluations)}
        held_out, ranks, values = [], [], {}
        for step in range(1, s.steps + 1):
            batch = next(batches)
            args = trainable, opt_state, frozen, batch, np.float32(rate)
            trainable, opt_state, loss = trainer.update(*args)
            self.advance(1, f"{rival.name}, rate {rate:g}, seed {seed}: {float(loss):.3f}")
            if step in marks:
                held_out.append((step, trainer.loss(trainable, frozen, self.data["held_out"])))
            if seed == 0 and (step in RANK_STEPS or step == s.steps):
                updates = rival.updates(trainable, frozen)
                middle = spectra.of_updates(updates, [s.layers // 2])
                ranks.append((step, spectra.median_rank(middle)))
                if step == s.steps:
                    values = spectra.of_updates(updates, sorted({0, s.layers // 2, s.layers - 1}))
        record = {
            "name": rival.name, "family": rival.family, "parameters": rival.parameters,
            "rate": rate, "seed": seed, "held_out": held_out, "ranks": ranks,
        }  # fmt: skip
        if seed == 0:  # the others take the rate that is the best of it
            record["validation"] = trainer.loss(trainable, frozen, self.data["validation"])
        return record, values

    def tuned(self, rival, seeds, tune=True):
        """Its runs with seed 0 over learning rates, and those of each seed at the best of them.

        Three rates, each about three times the one before, and more while the best is at an end;
        without `tune` the one to begin with alone.
        """
        at = RATES.index(rival.rate)
        tried = (at - 1, at, at + 1) if tune else (at,)
        first = {i: self.run(rival, RATES[i], 0) for i in tried}
        score = lambda i: first[i]["validation"] if np.isfinite(first[i]["validation"]) else np.inf
        while True:
            best = min(first, key=score)
            beyond = {min(first): best - 1, max(first): best + 1}.get(best)
            if not tune or beyond is None or not 0 <= beyond < len(RATES):
                break
            first[beyond] = self.run(rival, RATES[beyond], 0)
        others = [self.run(rival, RATES[best], seed) for seed in range(1, seeds)]
        return list(first.values()), [first[best], *others]

    def before(self, rival):
        """The held-out loss of the model as it is, which every rival starts from."""
        path = self.folder / "before.json"
        if not path.exists():
            trainer = self.trainer_of(rival)
            trainable, _, frozen = trainer.start(0)
            loss = trainer.loss(trainable, frozen, self.data["held_out"])
            write(path, json.dumps(loss).encode())
        return json.loads(path.read_text())

    def costs(self, rivals, repeats=3):
        """{name: {"seconds": of each round, "memory"}} of a step of each, all taking turns."""
        path = self.folder / "costs.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if not {rival.name for rival in rivals} <= set(known):
            batch = next(dialogues.batches(self.data["train"], self.tokenizer,
                         self.settings.batch_size, self.settings.seq_len, 0))  # fmt: skip
            found = {r.name: Trainer(r, self.settings).stepper(batch) for r in rivals}
            self.advance(0, "a step of each, taking turns")
            steps = [benchmark.Method(name, step) for name, (step, _) in found.items()]
            times = benchmark.timed(steps, repeats)
            known = {n: {"seconds": times[n], "memory": m} for n, (_, m) in found.items()}
            write(path, json.dumps(known).encode())
        return known


def singular_values(study, record):
    """What `spectra.of_updates` found at the end of a run."""
    path = study.path(record["name"], record["rate"], record["seed"]).with_suffix(".npz")
    with np.load(path) as file:
        return {name: file[name] for name in file}
