"""SmolLM2 as transformers and as the example have it, read from its GGUF file once in a process."""

import copy
import functools

import gguf_weights
import smollm2
import torch
import transformers

tokenizer = functools.cache(gguf_weights.tokenizer)


def source():
    """Where transformers finds the file."""
    path = gguf_weights.gguf_file()
    return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


@functools.cache
def llama():
    """(model, params) of the example."""
    config, params = gguf_weights.load()
    return smollm2.Llama(config), params


@functools.cache
def _torch_llama():
    return transformers.AutoModelForCausalLM.from_pretrained(**source(), dtype=torch.float32)


def torch_llama():
    """A model of one's own: what is done to it, no other sees."""
    return copy.deepcopy(_torch_llama())


@functools.cache
def torch_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(**source())
