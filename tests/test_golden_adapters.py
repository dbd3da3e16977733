"""Adapters that version 0.1 saved load for ever: two of its folders, and what they must give.

Every array that trains is `numbers` of its size, in both. `seed_of_a_stack` was saved from Linen,
with a seed in place of its bases, the layers 1 and 3 of a stack of 4, biases, and a head that was
trained whole; `ternary_of_nnx` from NNX, with sparse bases in the file.
"""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rl_nnx
from randlora_jax import trees
from randlora_jax.linen import RandLora
from tests.checkpoints import numbers

GOLDEN = pathlib.Path(__file__).parent / "golden" / "adapters_0_1"


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="down")(nn.tanh(nn.Dense(9, name="up")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = scan(name="layers")(x, None)
        return nn.DenseGeneral((2, 3), name="head")(x)


class Nnx(nnx.Module):
    def __init__(self):
        linear = nnx.Linear(5, 8, rngs=nnx.Rngs(0))
        self.layers = nnx.List([linear, nnx.Einsum("bi,oi->bo", (5, 8), rngs=nnx.Rngs(0))])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def test_a_seed_and_some_layers_of_a_stack_from_linen():
    x = jnp.ones((2, 6))
    base = Stack().init(jax.random.key(0), x)
    variables, config = rl.load_adapter(GOLDEN / "seed_of_a_stack", base)
    assert (config.r, config.randlora_alpha, config.layers_to_transform) == (4, 8.0, (1, 3))
    assert (config.projection_prng_key, config.save_projection) == (11, False)
    trained, _ = rl.split(variables, config)
    leaves = dict(trees.items(trained))
    assert {path[:2] for path in leaves} == {
        ("params", "layers"), ("params", "head"), ("randlora", "layers"),
    }  # fmt: skip
    assert len(leaves) == 8
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, numbers(leaf), err_msg=str(path))
    model = RandLora(Stack(), config)
    expected = Stack().apply({"params": model.merge(variables)}, x)
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-5)
    # What 0.1 computed with it, on the machine that saved it.
    first = [[-33.52047, 49.84494, -159.64581], [47.186493, 194.10512, 57.931858]]
    np.testing.assert_allclose(expected[0], first, rtol=1e-4)


def test_sparse_bases_in_the_file_from_nnx():
    model = Nnx()
    config = rl_nnx.load_adapter(GOLDEN / "ternary_of_nnx", model)
    assert (config.r, config.randlora_alpha, config.sparse) == (3, 6.0, True)
    values = rl_nnx.variables(model)
    assert values["randlora_bases"]["randlora_A"].dtype == jnp.int8
    for path, leaf in trees.items(values["randlora"]):
        np.testing.assert_array_equal(leaf, numbers(leaf), err_msg=str(path))
    first = [[1.0, 0.9842168, 1.0, 1.0, -0.9978531]]
    np.testing.assert_allclose(model(jnp.ones((1, 5))), first, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("seed_of_a_stack", lambda: Stack().init(jax.random.key(0), jnp.ones((2, 6)))),
        ("ternary_of_nnx", lambda: rl_nnx.variables(Nnx())),
    ],
)
def test_saved_again_it_is_described_in_the_same_words(name, base, tmp_path):
    rl.save_adapter(tmp_path / "again", *rl.load_adapter(GOLDEN / name, base()))
    old, new = (folder / "_METADATA" for folder in (GOLDEN / name, tmp_path / "again"))
    described = [text.read_text().split('"randlora_format"')[1] for text in (old, new)]
    assert described[0] == described[1]
