"""The example with a tiny Llama of random weights: real text, tokenizer, training and files."""

import functools
import pathlib
import resource

import dialogues
import finetune_smollm2
import gguf_weights
import jax
import jax.numpy as jnp
import smollm2

SIZES = smollm2.LlamaConfig(
    vocab_size=49152, hidden_size=32, ffn_size=64, layers=2, heads=4, kv_heads=2
)
SETTINGS = ["--seq-len", "64", "--rank", "4", "--batch-size", "4", "--steps", "6"]


@functools.cache
def load(path=None):
    init = jax.jit(smollm2.Llama(SIZES).init)
    return SIZES, init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


def fewer_held_out(pairs=dialogues.pairs):
    """Two batches, the second padded: nothing is learnt in six steps, and each takes as long."""
    train, held_out = pairs()
    return train, held_out[:13]


def short(apply, variables, prompt, max_new_tokens, eos, generate=smollm2.generate):
    """What random weights answer says nothing, and on a mesh each token gathers the weights."""
    return generate(apply, variables, prompt, min(max_new_tokens, 4), eos)


# What takes the place of the example's own; the tokenizer is its own, read once in a process.
REPLACED = [
    (gguf_weights, "load", load),
    (gguf_weights, "tokenizer", functools.cache(gguf_weights.tokenizer)),
    (dialogues, "pairs", fewer_held_out),
    (smollm2, "generate", short),
]


def run(argv):
    for replaced in REPLACED:
        setattr(*replaced)
    finetune_smollm2.run(argv)


def run_while_the_disk_fills(argv, fails):
    """`run`, on a disk that is full after 30 steps; the folder is the last of argv."""
    batches = dialogues.batches

    def filling(*args, **kwargs):
        for i, batch in enumerate(batches(*args, **kwargs)):
            if i == 30:
                fails(pathlib.Path(argv[-1]) / "filler")
            yield batch

    dialogues.batches = filling
    try:
        run(argv)
    except SystemExit as exit:
        print(exit)


def fill(path):
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1000))
        except OSError:
            pass


def limit(path):
    del path
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
