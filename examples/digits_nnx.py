"""The paper's claim in miniature, on real data with Flax NNX: is a full-rank update worth it?

A small network learns handwritten digits; then the pixels are shuffled, once and for all, and only
its two hidden layers may adapt. That needs an update of high rank. LoRA and RandLoRA get the same
number of parameters, and each its best learning rate and scale on validation data. The second part
is the control: a target of rank 4, where LoRA must win.

    python examples/digits_nnx.py
"""

import argparse
import dataclasses
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import randlora_jax as rl
from randlora_jax.nnx import RandLoraParam, inject

WIDTH = 64
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SCALES = (1.0, 10.0)
LAYERS = ["hidden_0", "hidden_1"]


class Net(nnx.Module):
    """64 pixels, two hidden layers, 10 classes."""

    def __init__(self, rngs):
        self.hidden_0 = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.hidden_1 = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden_1(nnx.relu(self.hidden_0(x)))))


@dataclasses.dataclass(frozen=True)
class Method:
    """How a trained net is made to adapt: `prepare(net, scale, rngs)`, and what trains then."""

    family: str
    size: int  # k of LoRA, r of RandLoRA
    parameters: int

    @property
    def name(self):
        letter = {"LoRA": " k=", "RandLoRA": " r="}.get(self.family)
        return self.family + (f"{letter}{self.size}" if letter else "")

    def prepare(self, net, scale, rngs):
        if self.family == "RandLoRA":
            config = rl.RandLoraConfig(
                r=self.size, randlora_alpha=scale * self.size, target_modules=LAYERS
            )
            inject(net, config)
            return RandLoraParam
        if self.family == "LoRA":
            start = nnx.initializers.uniform(2 * scale / WIDTH**0.5)
            centred = lambda *args: start(*args) - scale / WIDTH**0.5
            for name in LAYERS:
                lora = nnx.LoRA(WIDTH, self.size, WIDTH, base_module=getattr(net, name),
                                a_initializer=centred, rngs=rngs)  # fmt: skip
                setattr(net, name, lora)
            return nnx.LoRAParam
        return lambda path, value: (
            isinstance(value, nnx.Param) and path[-1] == "kernel" and (path[0] in LAYERS)
        )


def methods():
    """All of them, budgets as near to each other as r allows and never in RandLoRA's favour."""
    yield Method("full fine-tuning", 0, 2 * WIDTH * WIDTH)
    for k in (1, 2, 4, 8):
        lora = 2 * k * (WIDTH + WIDTH)
        counts = {r: 2 * rl.num_parameters([(WIDTH, WIDTH)], r) for r in range(1, WIDTH + 1)}
        r = max((r for r in counts if counts[r] <= lora), key=lambda r: (counts[r], -r))
        yield Method("LoRA", k, lora)
        yield Method("RandLoRA", r, counts[r])


def data(seed):
    """((x, labels) of train, validation and test) with pixels as they are and shuffled."""
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order, shuffled = rng.permutation(len(x)), rng.permutation(x.shape[1])
    x, labels = (x[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    cuts = slice(0, 1000), slice(1000, 1200), slice(1200, None)
    plain = [(x[c], labels[c]) for c in cuts]
    return plain, [(x[c][:, shuffled], labels[c]) for c in cuts]


def fit(graphdef, state, frozen, x, labels, rate, steps, seed, weight_decay=0.0):
    """Adam with a cosine schedule on `state`: the trained state and the loss on all of x."""
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    tx = optax.adamw(optax.cosine_decay_schedule(1.0, steps), weight_decay=weight_decay)

    def loss(state, x, labels):
        logits = nnx.merge(graphdef, state, frozen, copy=True)(x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def step(carry, key):
        state, opt_state = carry
        rows = jax.random.randint(key, (256,), 0, x.shape[0])
        gradients = jax.grad(loss)(state, x[rows], labels[rows])
        updates, opt_state = tx.update(gradients, opt_state, state)
        updates = jax.tree.map(lambda u: rate * u, updates)
        return (optax.apply_updates(state, updates), opt_state), None

    keys = jax.random.split(jax.random.key(seed), steps)
    (state, _), _ = jax.lax.scan(step, (state, tx.init(state)), keys)
    return state, loss(state, x, labels)


def accuracy(graphdef, state, frozen, x, labels):
    return jnp.mean(nnx.merge(graphdef, state, frozen, copy=True)(x).argmax(-1) == labels)


def pretrained(seed, plain, steps):
    """A net that reads digits."""
    (x, labels), _, (test_x, test_labels) = plain
    graphdef, state = nnx.split(Net(nnx.Rngs(seed)))
    train = jax.jit(lambda s: fit(graphdef, s, nnx.State({}), x, labels, 3e-3, steps, seed, 1e-4))
    state, _ = train(state)
    return state, float(accuracy(graphdef, state, nnx.State({}), test_x, test_labels))


def run(method, scale, states, sets, steps):
    """(validation, test accuracy, train loss), each (learning rates, seeds), of one method."""
    each = []
    for seed, (state, shuffled) in enumerate(zip(states, sets, strict=True)):
        net = nnx.merge(nnx.split(Net(nnx.Rngs(0)))[0], state, copy=True)
        wanted = method.prepare(net, scale, nnx.Rngs(100 + seed))
        graphdef, trainable, frozen = nnx.split(net, wanted, ...)
        each.append((trainable, frozen, shuffled, seed))

    def one(rate, trainable, frozen, shuffled, seed):
        (x, labels), *others = shuffled
        state, loss = fit(graphdef, trainable, frozen, x, labels, rate, steps, seed)
        return *(accuracy(graphdef, state, frozen, *o) for o in others), loss

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    over_seeds = jax.vmap(one, (None, 0, 0, 0, 0))
    over_rates = jax.jit(jax.vmap(over_seeds, (0, *(None,) * 4)))
    return np.array(over_rates(jnp.array(LEARNING_RATES), *stacked))


def tuned(method, states, sets, steps):
    """Test accuracies and train losses by seed, at the best mean validation accuracy."""
    scales = SCALES if method.size else SCALES[:1]
    each = np.concatenate([run(method, s, states, sets, steps) for s in scales], axis=1)
    best = each[0].mean(-1).argmax()
    return each[1, best], each[2, best]


def control(seeds, steps=3000):
    """Relative errors of LoRA's optimum (the SVD) and of RandLoRA, fitted to a rank-4 matrix."""
    r = 11
    bases = rl.draw_bases(rl.RandLoraConfig(r=r), WIDTH, WIDTH)
    n = -(-WIDTH // r)

    def error(scales, target):
        delta = rl.delta_weight(bases["randlora_A"], bases["randlora_B"], *scales, WIDTH, WIDTH, 1)
        return jnp.linalg.norm(delta - target) / jnp.linalg.norm(target)

    @jax.jit
    def fitted(target):
        tx = optax.adam(optax.cosine_decay_schedule(0.03, steps))

        def step(carry, _):
            scales, opt_state = carry
            updates, opt_state = tx.update(jax.grad(error)(scales, target), opt_state)
            return (optax.apply_updates(scales, updates), opt_state), None

        scales = jnp.zeros((r, n)), jnp.full((n, WIDTH), 1 / WIDTH)
        (scales, _), _ = jax.lax.scan(step, (scales, tx.init(scales)), length=steps)
        return error(scales, target)

    targets = [np.random.default_rng(s).normal(size=(2, WIDTH, 4)) for s in range(seeds)]
    targets = [(a @ b.T).astype(np.float32) for a, b in targets]
    lora = [np.linalg.norm(np.linalg.svd(t, compute_uv=False)[4:]) / np.linalg.norm(t)
            for t in targets]  # fmt: skip
    return np.array(lora), np.array([float(fitted(t)) for t in targets])


def plot(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for family, marker in (("LoRA", "s"), ("RandLoRA", "o"), ("full fine-tuning", "*")):
        mine = sorted((m.parameters, t.mean(), t.std()) for m, t, _ in rows if m.family == family)
        axes.errorbar(*zip(*mine, strict=True), marker=marker, capsize=3, label=family)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="test accuracy")
    counts = [256, 512, 1024, 2048, 4096, 8192]
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.set_xticks([], minor=True)
    axes.set_title("Digits with shuffled pixels")
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv=None):
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path("outputs/digits"))
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    console = Console(width=100)
    everything = [data(seed) for seed in range(args.seeds)]
    trained = [pretrained(seed, plain, args.steps) for seed, (plain, _) in enumerate(everything)]
    states, sets = [state for state, _ in trained], [shuffled for _, shuffled in everything]
    before = np.mean([accuracy_of_base(s, *d[2]) for s, d in zip(states, sets, strict=True)])
    console.print(f"test accuracy {np.mean([a for _, a in trained]):.3f}; {before:.3f} after the "
                  "pixels are shuffled")  # fmt: skip
    rows = [(m, *tuned(m, states, sets, args.steps))
            for m in track(list(methods()), console=console)]  # fmt: skip
    table = Table("method", "parameters", "test accuracy", "train loss",
                  title=f"Adapted to shuffled pixels, {args.seeds} seeds")  # fmt: skip
    for method, test, loss in rows:
        cells = f"{test.mean():.3f} ± {test.std():.3f}", f"{loss.mean():.4f} ± {loss.std():.4f}"
        table.add_row(method.name, f"{method.parameters:,}", *cells)
    console.print(table)
    lora, randlora = control(args.seeds)
    console.print(
        f"control, a {WIDTH} x {WIDTH} target of rank 4, relative error: LoRA k=4 (512 parameters) "
        f"{lora.mean():.3f}, RandLoRA r=11 (450 parameters) {randlora.mean():.3f} ± "
        f"{randlora.std():.3f}"
    )
    plot(rows, args.output_dir / "accuracy.png")
    console.print(f"plot: {args.output_dir / 'accuracy.png'}; {time.perf_counter() - begun:.0f} s")


def accuracy_of_base(state, x, labels):
    graphdef, _ = nnx.split(Net(nnx.Rngs(0)))
    return float(accuracy(graphdef, state, nnx.State({}), x, labels))


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError) as error:
        sys.exit(f'error: {error}: pip install -e ".[examples]"')
