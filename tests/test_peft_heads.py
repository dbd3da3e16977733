"""Tasks for which PEFT wants the model's head in the file, all of it."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

import randlora_jax as rl
from randlora_jax import peft
from randlora_jax.linen import RandLora
from tests.peft_adapters import WEIGHTS

CONFIG = rl.RandLoraConfig(r=2, target_modules=["up_proj"], task_type="SEQ_CLS")


class Scored(nn.Module):
    """A Llama's head for classes, by transformers' name."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="score")(nn.Dense(6, name="up_proj")(x))


class TwoLayers(nn.Module):
    """RoBERTa's head."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out_proj")(nn.tanh(nn.Dense(6, name="dense")(x)))


class Classified(nn.Module):
    @nn.compact
    def __call__(self, x):
        return TwoLayers(name="classifier")(nn.Dense(6, name="up_proj")(x))


def adapted(base):
    return RandLora(base, CONFIG).init(jax.random.key(0), jnp.ones((1, 4)))


def test_a_head_that_peft_would_miss_is_refused(tmp_path):
    variables = adapted(Scored())
    with pytest.raises(ValueError, match=r"put 'score' into modules_to_save, or save with config"):
        peft.save_adapter(tmp_path / "a", variables, CONFIG)
    assert not (tmp_path / "a").exists()
    peft.save_adapter(tmp_path / "b", variables, CONFIG.replace(task_type=None))
    peft.save_adapter(tmp_path / "c", variables, CONFIG.replace(modules_to_save=["score"]))
    assert "base_model.model.score.weight" in load_file(tmp_path / "c" / WEIGHTS)


def test_without_a_head_of_that_name_there_is_a_warning(tmp_path):
    config = CONFIG.replace(task_type="QUESTION_ANS")
    with pytest.warns(UserWarning, match="head, 'qa_outputs', in the file, and there is none"):
        peft.save_adapter(tmp_path, adapted(Scored()), config)


def test_a_head_counts_by_all_of_its_weights(tmp_path):
    variables = adapted(Classified())
    for changes in ({}, {"bias": "all"}, {"modules_to_save": ["classifier.dense"]}):
        with pytest.raises(ValueError, match=r"put 'classifier\.\w+' into modules_to_save"):
            peft.save_adapter(tmp_path, variables, CONFIG.replace(**changes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = CONFIG.replace(modules_to_save=["classifier"])
        peft.save_adapter(tmp_path / "a", variables, whole)
