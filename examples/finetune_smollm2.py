"""Fine-tune SmolLM2-135M-Instruct on real dialogues with RandLoRA, and keep the adapter.

python examples/finetune_smollm2.py                      # train, save, verify, show
python examples/finetune_smollm2.py --resume             # go on after an interruption
python examples/finetune_smollm2.py --mesh 4x2           # on 8 devices: FSDP x tensor parallel
python examples/finetune_smollm2.py --quantize nf4       # on a base of 4 bits, with qwix
python examples/finetune_smollm2.py --ask "Who are you?"  # answer with the saved adapter
"""

import argparse
import dataclasses
import importlib
import json
import math
import pathlib
import signal
import sys
import time

import adapter_training
import dialogues
import gguf_weights
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import smollm2
from smollm2 import PROJECTIONS

import randlora_jax as rl
from randlora_jax.linen import RandLora, quantize

TILES = {"int8": None, "nf4": 64}  # how many inputs share a scale, None being all


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
    parser.add_argument("--mesh", metavar="DATAxMODEL", help="divide the model among devices")
    parser.add_argument("--quantize", choices=TILES, help="freeze the base as these codes")
    parser.add_argument("--distributed", action="store_true", help="join the other processes")
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
        self.sums = jax.jit(
            lambda v, batch: adapter_training.sums(model.apply(v, batch["tokens"]), batch)
        )

    def loss(self, variables, batches):
        """Mean loss per token of the answers in all batches."""
        total, count = np.sum([self.sums(variables, batch) for batch in batches], axis=0)
        return float(total / count)

    def answer(self, variables, question):
        prompt = self.tokenizer.encode(gguf_weights.chat_prompt(question)).ids
        end = self.tokenizer.token_to_id("<|im_end|>")
        ids = smollm2.generate(self.model.apply, variables, prompt, 48, end)
        return self.tokenizer.decode(ids).strip()


def verify(model, llama, folder, variables, config, params, tokens):
    """Restores and merges the adapter: the merged parameters, equal to what was trained."""
    rl.save_adapter(folder / "adapter", variables, config, overwrite=True)
    restored, _ = rl.load_adapter(folder / "adapter", {"params": params})
    restored = jax.device_put(restored, jax.tree.map(lambda a: a.sharding, variables))
    apply = jax.jit(model.apply)
    logits = apply(variables, tokens)
    same = bool((apply(restored, tokens) == logits).all())
    merged = {"params": model.merge(restored)}
    off = float(jnp.abs(jax.jit(llama.apply)(merged, tokens) - logits).max())
    print(f"restored from {folder / 'adapter'}: logits {'identical' if same else 'DIFFERENT'}")
    print(f"merged into the base: logits differ by at most {off:.1e}")
    if not same or not off <= 1e-3:
        raise ValueError("the saved adapter is not what was trained")
    return merged


def quantized(llama, params, qtype):
    """The parameters with kernels of a type, each float kernel gone when its codes are there."""
    tokens, how = jnp.zeros((1, 8), jnp.int32), {"qtype": qtype, "tile_size": TILES[qtype]}
    base = {"params": params}
    return quantize(llama, base, tokens, target_modules=PROJECTIONS, donate=True, **how)["params"]


def ask(folder, question):
    """The answer of the model with the adapter that was saved there."""
    sizes, params = gguf_weights.load()
    llama = smollm2.Llama(sizes)
    settings = folder / "run.json"
    qtype = json.loads(settings.read_text()).get("quantize") if settings.exists() else None
    params = quantized(llama, params, qtype) if qtype else params
    variables, config = rl.load_adapter(folder / "adapter", {"params": params})
    merged = {"params": RandLora(llama, config).merge(variables)}
    return Chat(llama, gguf_weights.tokenizer()).answer(merged, question)


def main(argv=None):
    args, begun = parse(argv), time.perf_counter()
    folder = args.output_dir.resolve()
    if args.ask:
        print(ask(folder, args.ask))
        return
    from rich.console import Console
    from rich.table import Table

    importlib.import_module("matplotlib")  # if it is missing, now is the time to say so
    names = [field.name for field in dataclasses.fields(adapter_training.Run)]
    run = adapter_training.Run(**{name: getattr(args, name) for name in names})
    if args.distributed:
        meshes.join()
    mesh = meshes.make(args.mesh)
    if mesh is not None and run.batch_size % mesh.shape["data"]:
        raise ValueError(f"--batch-size {run.batch_size} does not divide by the mesh {args.mesh}")
    sizes, params = gguf_weights.load()
    llama, tokenizer = smollm2.Llama(sizes), gguf_weights.tokenizer()
    pairs, held_out = dialogues.pairs()
    dialogues.check_length(pairs, tokenizer, run.seq_len)
    adapter_training.begin(run, folder, args.resume)
    config = rl.RandLoraConfig(
        r=run.rank, randlora_alpha=20 * run.rank, target_modules=PROJECTIONS,
        projection_prng_key=run.seed, base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    params = meshes.divide(params, mesh)
    params = quantized(llama, params, run.quantize) if run.quantize else params
    model = RandLora(llama, config)
    base, whole = Chat(model.clone(active=()), tokenizer), Chat(llama, tokenizer)
    variables = model.adapt({"params": params}, jnp.zeros((1, 8), jnp.int32))
    if mesh is not None:
        tokens = jnp.zeros((run.batch_size, run.seq_len), jnp.int32)
        model = model.with_layout(variables, meshes.put(tokens, mesh, "data"))
    a_device = run.batch_size * run.seq_len // (mesh.shape["data"] if mesh else 1)
    print(rl.summary(variables, config, tokens=a_device))
    tests = dialogues.held_out_batches(held_out, tokenizer, 8, run.seq_len)
    asked = [q for q, _ in held_out if len(q) > 12][:: max(1, len(held_out) // 3)][:3]
    before = base.loss({"params": params}, tests)
    said = [base.answer({"params": params}, q) for q in asked]
    print(f"\n{len(pairs)} pairs to train on, {len(held_out)} held out")
    print(f"held-out loss before: {before:.3f}, perplexity {math.exp(before):.1f}")

    trained = adapter_training.train(run, model, tokenizer, config, variables, pairs, folder, mesh)
    variables, losses = trained
    if jax.process_index() == 0:
        adapter_training.plot(losses, folder / "loss.png")
    merged = verify(model, llama, folder, variables, config, params, tests[0]["tokens"])
    after = whole.loss(merged, tests)
    print(f"held-out loss after: {after:.3f}, perplexity {math.exp(after):.1f}")
    table = Table("question (held out)", "before", "after", show_lines=True)
    for question, old in zip(asked, said, strict=True):
        table.add_row(question, old, whole.answer(merged, question))
    Console().print(table)
    print(f"loss curve: {folder / 'loss.png'}; {time.perf_counter() - begun:.0f} s in all")


def run(argv=None):
    """`main`, with one clear line for whatever goes wrong."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit("interrupted: what was done is saved, go on with --resume")
    except ImportError as error:
        cure = "" if gguf_weights.INSTALL in str(error) else f": {gguf_weights.INSTALL}"
        sys.exit(f"error: {error}{cure}")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
