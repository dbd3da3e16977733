"""Which modules an adapter means: PEFT's rules over dotted paths."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from randlora_jax import RandLoraConfig
from randlora_jax.linen import RandLora
from randlora_jax.targets import Selection, selection

Q = "layers.0.attn.q_proj"


def hits(name, **values):
    config = RandLoraConfig(**values)
    return selection(config, name) is Selection.YES


@pytest.mark.parametrize("target", ["q_proj", "attn.q_proj", "0.attn.q_proj", Q])
def test_a_list_matches_whole_names_and_suffixes_at_a_dot(target):
    assert hits(Q, target_modules=["other", target])


@pytest.mark.parametrize("target", ["proj", "_proj", "ttn.q_proj", ".q_proj", "attn", "layers", ""])
def test_a_list_matches_no_other_part_of_a_name(target):
    assert not hits(Q, target_modules=[target])


def test_a_longer_name_is_not_matched_by_its_end():
    assert not hits("layers.0.attn.xq_proj", target_modules=["q_proj"])
    assert not hits("xq_proj", target_modules=["q_proj"])


def test_a_name_in_a_list_is_no_regular_expression():
    assert not hits(Q, target_modules=["q.proj", ".*q_proj"])


@pytest.mark.parametrize("pattern", [r".*q_proj", r"layers\.\d+\..*", r".*\.(q|v)_proj", Q])
def test_a_regular_expression_matches_the_whole_path(pattern):
    assert hits(Q, target_modules=pattern)


@pytest.mark.parametrize("pattern", ["q_proj", r".*attn", r"layers", r"layers\.\d+\.attn\.q"])
def test_a_regular_expression_matches_no_part_of_a_path(pattern):
    assert not hits(Q, target_modules=pattern)


@pytest.mark.parametrize("name", [Q, "head", "a.b_3.c"])
@pytest.mark.parametrize("all_linear", ["all-linear", "All-Linear"])
def test_all_linear_matches_everything(name, all_linear):
    assert hits(name, target_modules=all_linear)


def test_no_targets_match_nothing():
    assert not hits(Q)


@pytest.mark.parametrize("exclude", [["q_proj"], [Q], r".*q_proj", ["x", "attn.q_proj"]])
@pytest.mark.parametrize("targets", [["q_proj"], r".*q_proj", "all-linear"])
def test_exclude_modules_wins_over_target_modules(targets, exclude):
    assert not hits(Q, target_modules=targets, exclude_modules=exclude)


@pytest.mark.parametrize("exclude", [["proj"], ["attn"], r".*attn", r"q_proj"])
def test_exclude_modules_follows_the_rules_of_target_modules(exclude):
    assert hits(Q, target_modules=["q_proj"], exclude_modules=exclude)


@pytest.mark.parametrize("saved", ["q_proj", "attn", "layers", "layers.0", Q])
@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", Q])
def test_modules_to_save_and_what_is_within_are_not_adapted(saved, targets):
    assert not hits(Q, target_modules=targets, modules_to_save=[saved])


@pytest.mark.parametrize("saved", ["proj", "att", "ayers", "layers.1"])
def test_modules_to_save_matches_at_dots_alone(saved):
    assert hits(Q, target_modules=["q_proj"], modules_to_save=[saved])


NUMBERED = ["layers.3.mlp.up", "layers_3.mlp.up", "model.layers.3.mlp.up", "model.layers_3.mlp.up"]


@pytest.mark.parametrize("name", NUMBERED)
@pytest.mark.parametrize("pattern", [None, "layers", ["blocks", "layers"], r"l\w+s"])
@pytest.mark.parametrize("layers", [3, [3], [0, 3]])
def test_layers_to_transform_keeps_the_layers_it_names(name, pattern, layers):
    values = {"layers_to_transform": layers, "layers_pattern": pattern}
    assert hits(name, target_modules=["up"], **values)
    assert hits(name, target_modules="all-linear", **values)


@pytest.mark.parametrize("name", NUMBERED)
@pytest.mark.parametrize("pattern", [None, "layers"])
@pytest.mark.parametrize("layers", [2, 0, 33, [2, 30]])
def test_layers_to_transform_leaves_out_all_others(name, pattern, layers):
    values = {"layers_to_transform": layers, "layers_pattern": pattern}
    assert not hits(name, target_modules=["up"], **values)


@pytest.mark.parametrize("name", NUMBERED)
def test_another_layers_pattern_keeps_nothing(name):
    values = {"layers_to_transform": 3, "layers_pattern": "blocks"}
    assert not hits(name, target_modules=["up"], **values)
    assert not hits(name, target_modules=["up"], **(values | {"layers_pattern": "ayers"}))


def test_the_first_number_is_the_layer_unless_a_pattern_says_otherwise():
    name = "model.layers.1.experts.5.up"
    assert hits(name, target_modules=["up"], layers_to_transform=1)
    assert not hits(name, target_modules=["up"], layers_to_transform=5)
    assert hits(name, target_modules=["up"], layers_to_transform=5, layers_pattern="experts")


def test_numbers_of_several_digits_are_read_whole():
    name = "model.layers.12.up"
    assert hits(name, target_modules=["up"], layers_to_transform=12)
    assert not hits(name, target_modules=["up"], layers_to_transform=[1, 2])


def test_modules_without_a_number_are_in_no_layer():
    assert not hits("head.up", target_modules=["up"], layers_to_transform=[0, 1])


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.LayerNorm(name=f"norm_{i}")(nn.Dense(6, name=f"up_{i}")(x))
        return nn.Dense(3, name="head")(x)


def adapt(**values):
    x = jnp.ones((2, 5))
    model = RandLora(MLP(), RandLoraConfig(r=2, **values))
    return model.adapt({"params": MLP().init(jax.random.key(0), x)["params"]}, x)


@pytest.mark.parametrize(
    "values, names",
    [
        ({"target_modules": ["up_0", "head"]}, {"up_0", "head"}),
        ({"target_modules": r"up_[12]"}, {"up_1", "up_2"}),
        ({"target_modules": "all-linear"}, {"up_0", "up_1", "up_2", "head"}),
        ({"target_modules": "all-linear", "exclude_modules": r"up_.*"}, {"head"}),
        ({"target_modules": "all-linear", "modules_to_save": ["head"]}, {"up_0", "up_1", "up_2"}),
    ],
)
def test_the_layers_of_a_model_that_match_get_scales(values, names):
    assert set(adapt(**values)["randlora"]) == names


@pytest.mark.parametrize(
    "values, message",
    [
        ({}, "target_modules is None.*'all-linear'.*'head'"),
        ({"target_modules": ["upp_1"]}, "target_modules: 'upp_1' matches no module.*'up_1'"),
        ({"target_modules": ["head", "tail"]}, "target_modules: 'tail' matches no module"),
        ({"target_modules": r"down_\d"}, r"target_modules: 'down_\\\\d' matches no module"),
        (
            {"target_modules": ["norm_0"]},
            "'norm_0', which is a LayerNorm and not a known",
        ),
        (
            {"target_modules": ["head"], "exclude_modules": ["head"]},
            r"target_modules=.*exclude_modules=\('head',\).*leaves no linear layer",
        ),
        (
            {"target_modules": ["head"], "modules_to_save": ["head"]},
            r"modules_to_save=\('head',\).*leaves no linear layer",
        ),
    ],
)
def test_targets_that_mean_nothing_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        adapt(**values)
