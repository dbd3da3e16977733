"""The example with a tiny Llama of random weights: real text, tokenizer, training and files."""

import functools

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
    params = smollm2.Llama(SIZES).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return SIZES, params


def run(argv):
    gguf_weights.load = load
    finetune_smollm2.run(argv)
