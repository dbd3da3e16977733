"""Target matching against PEFT's own, on a table of names and settings."""

import itertools

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from randlora_jax import RandLoraConfig
from randlora_jax.targets import Selection, peft_matches, selection

NAMES = [
    "q_proj",
    "xq_proj",
    "head",
    "head.dense",
    "overhead.dense",
    "model.norm",
    "model.layers.0.attn.q_proj",
    "model.layers.0.attn.xq_proj",
    "model.layers.1.attn.v_proj",
    "model.layers.12.mlp.up",
    "model.layers.3.experts.1.up",
    "model.layers.1.q_proj.up",
    "model.blocks.1.mlp.up",
    "encoder.layers.1.mlp.down",
]
TARGETS = [
    ["q_proj"],
    ["attn.q_proj", "up"],
    ["up", "down", "dense"],
    ["layers.12.mlp.up"],
    [".*up"],
    ["proj"],
]
PATTERNS = [r".*q_proj", r".*\.(up|down)", "q_proj", r"model\.layers\.\d+\.attn\..*", "head"]
SAVED = [None, ["head"], ["attn"], ["up", "norm"], ["layers.1"]]
EXCLUDED = [None, ["q_proj"], ["head.dense"], r".*experts.*", "head"]
LAYERS = [
    {},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 12]},
    {"layers_to_transform": 1, "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": "experts"},
    {"layers_to_transform": [1, 3], "layers_pattern": ["blocks", "layers"]},
]


def ours(name, **values):
    config = RandLoraConfig(**values)
    return selection(config, name) is Selection.YES


def theirs(name, **values):
    # PEFT's RandLoRA has no exclude_modules, its LoRA has: the matching is one function.
    return bool(check_target_module_exists(peft.LoraConfig(**values), name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("targets", [*TARGETS, *PATTERNS], ids=str)
def test_modules_are_matched_as_in_peft(name, targets):
    layers = LAYERS if isinstance(targets, list) else LAYERS[:1]
    for saved, excluded, which in itertools.product(SAVED, EXCLUDED, layers):
        values = {"target_modules": targets, "modules_to_save": saved, **which}
        values["exclude_modules"] = excluded
        expected = theirs(name, **values)
        assert ours(name, **values) == expected, values
        if excluded is None:
            assert peft_matches(RandLoraConfig(**values), name) == expected, values


def test_a_whole_name_is_matched_whatever_the_layers_as_in_peft():
    values = {"target_modules": ["model.layers.12.mlp.up"], "layers_to_transform": 1}
    assert ours("model.layers.12.mlp.up", **values)
    assert theirs("model.layers.12.mlp.up", **values)
