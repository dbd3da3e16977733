"""Is RandLoRA worth it on a language model? Beside full fine-tuning and LoRA, at equal budgets.

    python examples/compare_smollm2.py                       # meant for an hour of 2 cores
    python examples/compare_smollm2.py --variants gamma-fixed alpha-x10  # and variants of ours
    python examples/compare_smollm2.py --steps 300 --seeds 5 --lora-ranks 1 4 16 64 \\
        --batch-size 32 --output-dir outputs/long            # on an accelerator

SmolLM2-135M learns dialogues. Each method takes its best learning rate on a validation part, and is
measured on pairs that it never saw, with several seeds. Interrupted, the same command goes on.
"""

import argparse
import importlib
import os
import pathlib
import sys
import time

import dialogues
import gguf_weights
import jax
import jax.numpy as jnp
import numpy as np
import rivals
import smollm2
import spectra
import study
from smollm2 import PROJECTIONS

import randlora_jax as rl
from randlora_jax.linen import RandLora

MARKERS = {rivals.FULL: "*", rivals.LORA: "s", rivals.RANDLORA: "o", rivals.VARIED: "x"}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora-ranks", type=int, nargs="+", default=[1, 16], help="the budgets")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=56)
    parser.add_argument("--layers", type=int, default=30, help="the first of the model's")
    parser.add_argument("--evaluations", type=int, default=2, help="on held-out pairs, in a run")
    parser.add_argument("--no-tune", dest="tune", action="store_false",
                        help="take the learning rate at which tuning begins")  # fmt: skip
    parser.add_argument("--variants", nargs="+", choices=rivals.VARIANTS, default=[],
                        help="of the last RandLoRA, with one seed")  # fmt: skip
    parser.add_argument("--output-dir", type=pathlib.Path, default=pathlib.Path("outputs/compare"))
    args = parser.parse_args(argv)
    # The first step of the warm-up has the rate 0, so one alone trains nothing.
    least = {"steps": 2, "seeds": 1, "batch_size": 1, "seq_len": 1, "layers": 1, "evaluations": 1}
    given = [(name, getattr(args, name), bound) for name, bound in least.items()]
    for name, value, bound in [*given, ("lora_ranks", min(args.lora_ranks), 1)]:
        if value < bound:
            parser.error(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
    return args


def contestants(llama, params, lora_ranks, others):
    """Full fine-tuning, and for each rank LoRA and the RandLoRA that trains as much or less.

    `others` are variants of the last of ours.
    """
    found = [rivals.full(llama, params)]
    config = rl.RandLoraConfig(target_modules=PROJECTIONS)
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(RandLora(llama, config).adapt, {"params": params}, tokens)
    for rank in lora_ranks:
        ours = rl.matching_config(shapes, config, lora_rank=rank)
        found += [rivals.lora(llama, params, rank), rivals.randlora(llama, params, ours)]
    found += [rivals.varied(llama, params, ours, kind) for kind in others]
    return found


def progress(console):
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (BarColumn(20), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(),
               TextColumn("left"), Remaining(), TextColumn("{task.description}"))  # fmt: skip
    return Progress(*columns, console=console)


def trained(args, everyone, folder, settings, data, tokenizer, console):
    """(study, {rival: (runs that tuned it, runs of each seed)}, costs)."""
    # A variant is there to show what a start or an alpha does, for which one seed is enough.
    seeds = {r.name: 1 if r.family == rivals.VARIED else args.seeds for r in everyone}
    with progress(console) as bar:
        task = bar.add_task("", total=sum(2 + n for n in seeds.values()) * args.steps)

        def advance(steps, text):
            bar.update(task, advance=steps, **({"description": text} if text else {}))

        kept = study.Study(folder, settings, tokenizer, data, advance)
        kept.before(everyone[0])
        found, done = {}, 0
        for rival in everyone:
            found[rival.name] = kept.tuned(rival, seeds[rival.name], args.tune)
            done += (2 + seeds[rival.name]) * args.steps
            bar.update(task, completed=done)  # some take more than three rates
        costs = kept.costs([rival for rival in everyone if rival.family != rivals.VARIED])
    return kept, found, costs


def mean(values):
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def tables(found, costs, ranks):
    from rich.table import Table

    result = Table("method", "parameters", "rate", "held-out loss", "s a step", "over full", "GB",
                   "effective rank")  # fmt: skip
    for name, (_, seeds) in found.items():
        cells = ["", "", ""]
        if name in costs:
            seconds, full = costs[name]["seconds"], costs[rivals.FULL]["seconds"]
            over = np.median([a / b for a, b in zip(seconds, full, strict=True)])
            gigabytes = costs[name]["memory"] / 1e9
            cells = [f"{np.median(seconds):.2f}", f"{over:.2f}", f"{gigabytes:.2f}"]
        result.add_row(name, f"{seeds[0]['parameters']:,}", f"{seeds[0]['rate']:g}",
                       mean([run["held_out"][-1][1] for run in seeds]), *cells,
                       f"{ranks[name]:.0f}")  # fmt: skip
    rates = sorted({run["rate"] for tuning, _ in found.values() for run in tuning})
    tuned = Table("validation loss at rate", *(f"{rate:g}" for rate in rates))
    for name, (tuning, _) in found.items():
        at = {run["rate"]: f"{run['validation']:.3f}" for run in tuning}
        tuned.add_row(name, *(at.get(rate, "") for rate in rates))
    return result, tuned


def plot(found, costs, before, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for family, marker in MARKERS.items():
        points = []
        for seeds in (seeds for _, seeds in found.values() if seeds[0]["family"] == family):
            losses = [run["held_out"][-1][1] for run in seeds]
            deviation = np.std(losses, ddof=1) if len(losses) > 1 else 0
            points.append((seeds[0]["parameters"], np.mean(losses), deviation))
        if points:
            line = "none" if family == rivals.VARIED else "-"  # those differ in more than size
            left.errorbar(*zip(*sorted(points), strict=True), marker=marker, linestyle=line,
                          capsize=3, label=family)  # fmt: skip
    left.set(xscale="log", xlabel="trained parameters", ylabel="held-out loss (nats per token)")
    left.legend()
    for name in costs:
        seeds = found[name][1]
        steps = [0] + [step for step, _ in seeds[0]["held_out"]]
        each = [[before] + [loss for _, loss in run["held_out"]] for run in seeds]
        seconds = np.array(steps) * np.median(costs[name]["seconds"])
        right.plot(seconds, np.mean(each, axis=0), label=name,
                   marker=MARKERS[seeds[0]["family"]])  # fmt: skip
    first = [run["held_out"][0][1] for name in costs for run in found[name][1]]
    right.set(xlabel="seconds of training", ylabel="held-out loss (nats per token)")
    right.set_ylim(top=np.nanmax(first) + 0.1)  # the model as it is lies far above
    right.legend(fontsize=8)
    figure.suptitle("SmolLM2-135M on dialogues, each at its best learning rate")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    from rich.console import Console

    args, console, begun = parse(argv), Console(width=130), time.perf_counter()
    for package in ("matplotlib", "qwix"):
        importlib.import_module(package)  # if it is missing, now is the time to say so
    sizes, params = smollm2.first_layers(*gguf_weights.load(), args.layers)
    llama, tokenizer = smollm2.Llama(sizes), gguf_weights.tokenizer()
    train, *tests = dialogues.with_validation()
    dialogues.check_length(train, tokenizer, args.seq_len)
    tests = [dialogues.held_out_batches(t, tokenizer, args.batch_size, args.seq_len) for t in tests]
    data = dict(zip(("train", "validation", "held_out"), (train, *tests), strict=True))
    settings = study.Settings(
        args.steps, args.batch_size, args.seq_len, args.evaluations, sizes.layers,
        jax.devices()[0].device_kind,
    )  # fmt: skip
    everyone = contestants(llama, params, args.lora_ranks, args.variants)
    folder = args.output_dir.resolve()
    kept, found, costs = trained(args, everyone, folder, settings, data, tokenizer, console)
    before = kept.before(everyone[0])
    values = {name: study.singular_values(kept, seeds[0]) for name, (_, seeds) in found.items()}
    ranks = {name: seeds[0]["ranks"] for name, (_, seeds) in found.items()}
    console.print(f"{len(train)} pairs to train on; held-out loss before: {before:.3f}")
    last = {name: spectra.median_rank(v) for name, v in values.items()}
    for table in tables(found, costs, last):
        console.print(table)
    plot(found, costs, before, folder / "comparison.png")
    spectra.plot(values, ranks, folder / "spectra.png")
    console.print(f"jax {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores; plots: "
                  f"comparison.png and spectra.png in {folder}; {time.perf_counter() - begun:.0f} s"
                  )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the runs that ended are kept, the same command goes on")
    except ImportError as error:
        sys.exit(f"error: {error}: {gguf_weights.INSTALL}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
