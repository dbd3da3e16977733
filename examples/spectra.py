"""How many directions an update of a kernel uses: singular values and the effective rank."""

import numpy as np


def singular_values(update):
    """Singular values of a matrix, largest first, in float64; of one that is not finite NaN."""
    update = np.asarray(update, np.float64)
    if not np.isfinite(update).all():  # a learning rate that was too large
        return np.full(min(update.shape), np.nan)
    if update.shape[0] < update.shape[1]:
        update = update.T
    # Of the smaller square, which is less work; half the digits of float64 are left.
    return np.sqrt(np.maximum(np.linalg.eigvalsh(update.T @ update)[::-1], 0))


def effective_rank(values):
    """exp of the entropy of singular values over their sum (Roy and Vetterli 2007); of none 0.

    k equal values give k; a long tail of small ones counts little.
    """
    values = np.asarray(values, np.float64)
    shares = values[values > 0] / max(values.sum(), np.finfo(np.float64).tiny)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def of_updates(updates, layers):
    """{name: singular values} of stacked updates (L, in, out), of some of the layers.

    Only kernels whose smaller side is the largest: the ranks of the others have another maximum.
    """
    most = max(min(update.shape[1:]) for update in updates.values())
    return {
        f"{layer}.{path[-2]}": singular_values(update[layer])
        for path, update in updates.items() if min(update.shape[1:]) == most
        for layer in layers
    }  # fmt: skip


def median_rank(spectra):
    return float(np.median([effective_rank(values) for values in spectra.values()]))


def plot(spectra, ranks, path):
    """Draws {name: {kernel: values}}, each over its largest, and {name: [(step, rank)]}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, kernels in spectra.items():
        each = np.array([values / values[0] for values in kernels.values()])
        middle = np.median(each, axis=0)
        middle = middle[middle > 1e-6]
        left.plot(np.arange(1, len(middle) + 1), middle, label=name,
                  marker="." if len(middle) == 1 else "")  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="singular value", ylabel="over the largest",
             ylim=(1e-4, 1.5), title="Trained updates, median over kernels")  # fmt: skip
    left.legend(fontsize=8, loc="lower left")
    for name, points in ranks.items():
        moved = [point for point in points if point[1]]  # in warm-up, the first step is of rate 0
        right.plot(*zip(*moved, strict=True), marker=".", label=name)
    right.set(xscale="log", yscale="log", xlabel="step", ylabel="effective rank",
              title="Effective rank of a middle layer's updates")  # fmt: skip
    steps = sorted({step for points in ranks.values() for step, rank in points if rank})
    right.set_xticks(steps, [str(step) for step in steps])
    right.set_xticks([], minor=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
