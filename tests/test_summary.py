"""The summary's numbers against a count by hand."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import randlora_jax as rl
from randlora_jax.linen import RandLora


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(13, name="up")(x))
        return nn.Dense(5, name="down")(x)


def describe(shapes=False, **values):
    config = rl.RandLoraConfig(**{"r": 3, "target_modules": ["up", "down"], **values})
    model, x = RandLora(MLP(), config), jnp.ones((2, 7))
    init = (lambda *args: jax.eval_shape(model.init, *args)) if shapes else model.init
    return rl.summary(init(jax.random.key(0), x), config)


def row(text, name):
    """The cells of the line that begins with `name`."""
    (line,) = (line for line in text.splitlines() if line.startswith(name + "  "))
    return re.split(r"  +", line)


def test_each_adapted_layer_has_its_shapes_and_count():
    text = describe()
    # up: n = ceil(7 / 3) = 3, 3 * 3 + 3 * 7 = 30; down: n = ceil(5 / 3) = 2, 3 * 2 + 2 * 5 = 16
    assert row(text, "up") == ["up", "(7, 13)", "(3, 3)", "(3, 7)", "30"]
    assert row(text, "down") == ["down", "(13, 5)", "(3, 2)", "(2, 5)", "16"]


def test_a_layer_that_is_no_target_is_not_listed():
    with pytest.raises(ValueError, match="unpack"):
        row(describe(target_modules=["up"]), "down")


# The base has 7 * 13 + 13 + 13 * 5 + 5 = 174 parameters.
@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, "46 of 220 (20.91 %)"),
        ({"target_modules": ["up"]}, "30 of 204 (14.71 %)"),
        ({"bias": "all"}, "64 of 220 (29.09 %)"),
        ({"target_modules": ["up"], "bias": "randlora_only"}, "43 of 204 (21.08 %)"),
        ({"target_modules": ["up"], "modules_to_save": ["down"]}, "100 of 204 (49.02 %)"),
    ],
    ids=str,
)
def test_parameters_are_counted_once(values, expected):
    assert row(describe(**values), "trainable parameters")[1] == expected


# The largest sides are 13 and 7: A is (3, 1, 7) and B is (13, 3, 3), 21 + 117 = 138 numbers.
@pytest.mark.parametrize(
    "values, expected", [({}, "552 B"), ({"sparse": True}, "146 B"), ({"r": 20}, "1.6 kB")]
)
def test_bases_are_counted_once_for_all_layers(values, expected):
    # r = 20: A is (20, 1, 7) and B is (13, 1, 20), 400 numbers.
    assert row(describe(**values), "bases")[1].startswith(expected + ",")


def test_a_checkpoint_is_what_trains_and_the_bases():
    assert row(describe(), "checkpoint")[1].startswith("736 B")  # 46 * 4 + 552 bytes


def test_a_checkpoint_without_bases_is_what_trains():
    (size,) = re.findall(r"checkpoint +([\d.]+ k?B)", describe(save_projection=False))
    assert size == "184 B"


def test_shapes_alone_give_the_same_text():
    assert describe(shapes=True, bias="all") == describe(bias="all")


@pytest.mark.parametrize(
    "tokens, strategy, ways",
    [
        (2, "auto", ["vectors", "vectors"]),
        (3, "auto", ["factored", "factored"]),
        (5000, "auto", ["merged", "merged"]),
        (5000, "factored", ["factored", "factored"]),
        (2, "merged", ["merged", "merged"]),
    ],
)
def test_with_tokens_it_says_how_each_layer_is_computed_and_what_that_costs(tokens, strategy, ways):
    config = rl.RandLoraConfig(r=3, target_modules=["up"])
    model, x = RandLora(MLP(), config), jnp.ones((2, 7))
    text = rl.summary(model.init(jax.random.key(0), x), config, tokens=tokens, strategy=strategy)
    *_, forward, backward, over = row(text, "up")
    assert [forward, backward] == ways
    T, d, D, m = tokens, 7, 13, 9
    thin = 2 * T * m * (d + D) + 2 * T * m * (2 * d + D)
    expected = 4 * T * d * D + thin if ways[0] != "merged" else 6 * T * d * D + 6 * m * d * D
    assert float(over) == pytest.approx(expected / (4 * T * d * D), abs=0.006)


class TestOnEachDevice:
    """A kernel of 8 x 16; lambda (4, 2) and gamma (2, 8); A (4, 1, 8) and B (16, 2, 4)."""

    CONFIG = rl.RandLoraConfig(r=4, target_modules="all-linear")
    SHAPE, AXES = (4, 2), ("data", "model")

    def variables(self):
        model = RandLora(nn.Dense(16, use_bias=False), self.CONFIG)
        return model.init(jax.random.key(0), jnp.ones((1, 8)))

    @pytest.mark.parametrize("make", [jax.make_mesh, AbstractMesh])
    def test_it_is_told_by_shardings(self, make):
        mesh, variables = make(self.SHAPE, self.AXES), self.variables()
        variables["params"]["kernel"] = nn.Partitioned(variables["params"]["kernel"], self.AXES)
        shapes = jax.eval_shape(lambda: variables)
        told = lambda **axes: rl.summary(
            shapes, self.CONFIG, shardings=rl.sharding(shapes, self.CONFIG, mesh, **axes)
        )
        held = "base 64 B, scales 96 B, bases 640 B"
        assert row(told(), "on each of 8")[1] == held
        held = "base 64 B, scales 48 B, bases 192 B"
        divided = told(data_axes=["model"], bases_axes=["model", "data"])
        assert row(divided, "on each of 8")[1] == held

    def test_it_is_told_by_the_arrays(self):
        variables = self.variables()
        assert "on each" not in rl.summary(variables, self.CONFIG)
        where = NamedSharding(jax.make_mesh(self.SHAPE, self.AXES), PartitionSpec("data"))
        params = {"kernel": jax.device_put(variables["params"]["kernel"], where)}
        model = RandLora(nn.Dense(16, use_bias=False), self.CONFIG)
        placed = model.adapt({"params": params}, jnp.ones((1, 8)))
        held = "base 128 B, scales 96 B, bases 640 B"
        assert row(rl.summary(placed, self.CONFIG), "on each of 8")[1] == held
