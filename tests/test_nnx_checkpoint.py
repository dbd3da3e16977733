"""Adapters and bases on disk: files that Linen and NNX share, and base checkpoints as they were."""

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import linen
from randlora_jax.nnx import (
    ADDED,
    RandLoraParam,
    inject,
    load_adapter,
    merge,
    update,
    variables,
)
from tests.nnx_models import (
    CONFIG,
    MLP,
    D,
    OwnEinsum,
    Stack,
    assert_close,
    randomised,
    trained,
    unchanged_if_it_fails,
    x,
)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(D, name="down")(nn.tanh(nn.Dense(8, name="up")(x)))


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            nn.remat(lambda block, x, _: (block(x), None)),
            variable_axes={"params": 0}, split_rngs={"params": True}, length=3,
        )  # fmt: skip
        x, _ = scan(LinenBlock(name="blocks"), x, None)
        return nn.Dense(4, name="head")(x)


class LinenMixed(nn.Module):
    """Attention, whose output has two input axes, and an Einsum with its input in the middle."""

    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attn")(x)
        return nn.Einsum((4, D, 3), "bti,oin->bton", use_bias=False, name="einsum")(x)


class Mixed(nnx.Module):
    def __init__(self, *, rngs):
        self.attn = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.einsum = nnx.Einsum("bti,oin->bton", (4, D, 3), rngs=rngs)

    def __call__(self, x):
        return self.einsum(self.attn(x))


PAIRS = {
    "stack": (LinenStack, Stack, (5, D), CONFIG),
    "some_layers": (
        LinenStack,
        Stack,
        (5, D),
        CONFIG.replace(
            target_modules=["up"], layers_to_transform=[0, 2], modules_to_save=["head"], bias="all"
        ),
    ),
    "seed_alone": (LinenStack, Stack, (5, D), CONFIG.replace(save_projection=False, sparse=True)),
    "mixed": (LinenMixed, Mixed, (2, 5, D), CONFIG),
}


def random_all(values, config):
    trainable, frozen = rl.split(values, config)
    return rl.combine(randomised(trainable), frozen)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", PAIRS)
def test_one_file_serves_both_worlds(name, tmp_path):
    make_linen, make_nnx, shape, config = PAIRS[name]
    model, value = make_nnx(rngs=nnx.Rngs(0)), x(0, *shape)
    base = variables(model)
    wrapped = linen.RandLora(make_linen(), config)
    theirs = random_all(wrapped.adapt(base, value), config)

    rl.save_adapter(tmp_path / "from_linen", theirs, config)
    assert load_adapter(tmp_path / "from_linen", model) == config
    assert_same(variables(model), theirs)
    expected = np.asarray(wrapped.apply(theirs, value))
    assert_close(np.asarray(model(value)), expected, 1e-6)

    rl.save_adapter(tmp_path / "from_nnx", variables(model), config)
    back, same = rl.load_adapter(tmp_path / "from_nnx", base)
    assert same == config
    assert_same(back, theirs)
    assert_close(np.asarray(merge(model)(value)), expected, 2e-5)
    merged = wrapped.merge(theirs, value)
    assert_same(variables(model)["params"], merged)


def test_loading_onto_an_injected_model_updates_it(tmp_path):
    model = trained(MLP(rngs=nnx.Rngs(0)))
    rl.save_adapter(tmp_path / "a", variables(model), CONFIG)
    other = inject(MLP(rngs=nnx.Rngs(0)), CONFIG)
    run = nnx.jit(lambda m, x: m(x))
    run(other, x())
    load_adapter(tmp_path / "a", other)
    np.testing.assert_array_equal(run(other, x()), run(model, x()))
    third = inject(MLP(rngs=nnx.Rngs(0)), CONFIG.replace(r=2))
    before = third(x())
    with pytest.raises(ValueError, match="another config"):
        load_adapter(tmp_path / "a", third)
    np.testing.assert_array_equal(third(x()), before)


def test_a_file_of_another_model_changes_nothing(tmp_path):
    config = CONFIG.replace(target_modules=["up"])
    rl.save_adapter(tmp_path / "a", variables(trained(MLP(1, rngs=nnx.Rngs(0)), config)), config)
    model = MLP(2, rngs=nnx.Rngs(0))
    message = r"'layers.1.up.randlora_gamma'.*another model"
    with pytest.raises(ValueError, match=message), unchanged_if_it_fails(model):
        load_adapter(tmp_path / "a", model)
    with pytest.raises(ValueError, match="does not fit"):
        load_adapter(tmp_path / "a", OwnEinsum("bi,io->bo", (D, 3), rngs=nnx.Rngs(0)))
    with pytest.raises(FileNotFoundError), unchanged_if_it_fails(model):
        load_adapter(tmp_path / "b", model)


def test_an_equal_path_serves_a_model_with_a_list_whose_indices_are_numbers(tmp_path):
    model = trained(MLP(rngs=nnx.Rngs(0)))
    rl.save_adapter(tmp_path / "a", variables(model), CONFIG)
    other = MLP(rngs=nnx.Rngs(0))
    load_adapter(tmp_path / "a", other)
    np.testing.assert_array_equal(other(x()), model(x()))


@pytest.mark.parametrize("make", [MLP, Stack])
def test_a_base_checkpoint_from_before_restores_after_injection(make, tmp_path):
    base = make(rngs=nnx.Rngs(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", nnx.state(base))
        checkpointer.wait_until_finished()
        model = trained(make(rngs=nnx.Rngs(0)))
        scales = jax.tree.map(np.asarray, nnx.state(model, RandLoraParam))
        _, _, rest = nnx.split(model, ADDED, ...)
        nnx.update(model, checkpointer.restore(tmp_path / "base", rest))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, RandLoraParam), scales)
    fresh = trained(make(rngs=nnx.Rngs(3)))
    np.testing.assert_array_equal(model(x()), fresh(x()))


def test_scales_alone_go_through_orbax(tmp_path):
    model = trained(Stack(rngs=nnx.Rngs(0)))
    other = inject(Stack(rngs=nnx.Rngs(0)), CONFIG)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "scales", nnx.state(model, RandLoraParam))
        checkpointer.wait_until_finished()
        target = nnx.state(other, RandLoraParam)
        nnx.update(other, checkpointer.restore(tmp_path / "scales", target))
    assert isinstance(other.blocks.up.randlora_lambda, RandLoraParam)
    np.testing.assert_array_equal(other(x()), model(x()))


def test_several_adapters_are_saved_one_by_one(tmp_path):
    configs = {"a": CONFIG.replace(target_modules=["up"]), "b": CONFIG.replace(randlora_alpha=1.0)}
    model = trained(MLP(rngs=nnx.Rngs(0)), configs)
    one, config = rl.adapters.select(variables(model), configs, "b")
    rl.save_adapter(tmp_path / "b", one, config)
    alone = MLP(rngs=nnx.Rngs(0))
    load_adapter(tmp_path / "b", alone)
    both = inject(MLP(rngs=nnx.Rngs(0)), configs, values=variables(model), active=("b",))
    assert_close(np.asarray(both(x())), np.asarray(alone(x())), 1e-6)


def test_variables_and_update_are_inverse():
    config = CONFIG.replace(target_modules=["up"], layers_to_transform=[2, 0])
    model, other = trained(Stack(rngs=nnx.Rngs(0)), config), inject(Stack(rngs=nnx.Rngs(1)), config)
    update(other, variables(model))
    assert_same(variables(other), variables(model))
    np.testing.assert_array_equal(other(x()), model(x()))
