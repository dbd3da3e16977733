"""Decoding with an adapter for each row: tokens a second of one block's projections, beside rivals.

    python examples/rows.py                        # a table and a plot
    python examples/rows.py --hidden 2048 --ffn 8192 --rows 1 8 64

Each row is one token, as when a server decodes. All ways run in each round, so that a ratio
compares runs of the same minute. `benchmark.py` runs this too.
"""

import argparse
import functools
import math
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from randlora_jax.ops import RandLoraDotGeneral

LORA_RANK = 16
DIMS = (((1,), (0,)), ((), ()))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--kv", type=int, default=192, help="features of keys and of values")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path("outputs/rows"))
    return parser.parse_args(argv)


def made(args):
    """(kernels, bases, RandLoRA's table, LoRA's table) of one block's seven projections."""
    d, f, kv = args.hidden, args.ffn, args.kv
    sizes = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    keys = iter(jax.random.split(jax.random.key(0), 99))
    draw = lambda *shape: (0.02 * jax.random.normal(next(keys), shape)).astype(args.dtype)
    low = max(min(pair) for pair in sizes)
    n, count = math.ceil(low / args.rank), args.adapters
    bases = {"randlora_A": draw(args.rank, 1, low), "randlora_B": draw(max(d, f), n, args.rank)}
    kernels, ours, lora = [], [], []
    for ins, outs in sizes:
        n = math.ceil(min(ins, outs) / args.rank)
        kernels.append(draw(ins, outs))
        ours.append((draw(count, args.rank, n), draw(count, n, min(ins, outs))))
        lora.append((draw(count, ins, LORA_RANK), draw(count, LORA_RANK, outs)))
    return kernels, bases, ours, lora


def ways():
    """{name: function of (x of each input size, ids, kernels, bases, RandLoRA's, LoRA's)}."""

    def each(function):
        def run(xs, ids, kernels, bases, ours, lora):
            layers = zip(kernels, ours, lora, strict=True)
            return [function(xs[k.shape[0]], ids, k, bases, o, a) for k, o, a in layers]

        return run

    def mixed(x, ids, kernel, bases, ours, lora, strategy="auto"):
        rows = tuple(scale[ids] for scale in ours)
        return RandLoraDotGeneral(bases, [rows], strategy=strategy)(x, kernel, DIMS)

    def one(x, ids, kernel, bases, ours, lora, strategy="auto"):
        scales = tuple(scale[ids[0]] for scale in ours)
        return RandLoraDotGeneral(bases, [scales], strategy=strategy)(x, kernel, DIMS)

    def gathered(x, ids, kernel, bases, ours, lora):
        down, up = (factor[ids] for factor in lora)
        return x @ kernel + jnp.einsum("tr,tro->to", jnp.einsum("ti,tir->tr", x, down), up)

    return {
        "frozen base": each(lambda x, ids, kernel, bases, ours, lora: x @ kernel),
        "RandLoRA, a row each": each(mixed),
        "RandLoRA, one for all": each(one),
        "RandLoRA, vmap of factors": each(functools.partial(mixed, strategy="factored")),
        f"LoRA {LORA_RANK} by gather": each(gathered),
    }


def measured(args, rows):
    """{way: (seconds of each round, bytes read and written, temporary bytes)} of so many rows."""
    kernels, bases, ours, lora = made(args)
    sizes = {kernel.shape[0] for kernel in kernels}
    xs = {n: jnp.ones((rows, n), args.dtype) for n in sizes}
    ids = jax.random.randint(jax.random.key(1), (rows,), 0, args.adapters)
    given, runs, found = (xs, ids, kernels, bases, ours, lora), {}, {}
    for name, function in ways().items():
        runs[name] = jax.jit(function).lower(*given).compile()
        memory = runs[name].memory_analysis().temp_size_in_bytes
        found[name] = ([], runs[name].cost_analysis()["bytes accessed"], memory)
    for turn in range(args.repeats + 1):
        for name, run in runs.items():
            calls = max(1, 64 // rows)
            jax.block_until_ready(run(*given))
            begun = time.perf_counter()
            for _ in range(calls):
                last = run(*given)
            jax.block_until_ready(last)
            if turn:
                found[name][0].append((time.perf_counter() - begun) / calls)
    return found


def plot(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name in next(iter(results.values())):
        rates = [n / statistics.median(found[name][0]) for n, found in results.items()]
        axes.plot(list(results), rates, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows, each one token",
             ylabel="tokens a second, one block")  # fmt: skip
    axes.set_xticks(list(results), [str(n) for n in results])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv=None):
    from rich.console import Console
    from rich.table import Table

    args = parse(argv)
    console = Console(width=110)
    title = f"One block, hidden {args.hidden}, FFN {args.ffn}, r={args.rank}, {args.dtype}"
    table = Table("rows", "way", "ms", "time over frozen", "bytes over frozen", "temporary MB",
                  title=title)  # fmt: skip
    results = {}
    for rows in args.rows:
        results[rows] = found = measured(args, rows)
        base, base_bytes, _ = found["frozen base"]
        for name, (seconds, nbytes, memory) in found.items():
            over = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
            table.add_row(str(rows), name, f"{1e3 * statistics.median(seconds):.2f}", f"{over:.2f}",
                          f"{nbytes / base_bytes:.2f}", f"{memory / 1e6:.1f}")  # fmt: skip
        table.add_section()
    console.print(table)
    plot(results, args.output_dir / "rows.png")
    console.print(f"jax {jax.__version__}, {jax.default_backend()}; {args.output_dir / 'rows.png'}")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
