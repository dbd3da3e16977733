"""The same of NNX models: a batch of which each row has its own adapter."""

import jax
import numpy as np
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rx
from tests.linen_cases import normal
from tests.mixing import CONFIG, NAMES, D, small, tokens

CONFIGS = {
    "chat": CONFIG,
    "code": CONFIG.replace(randlora_alpha=0.7, target_modules=["up"]),
    "math": CONFIG.replace(randlora_alpha=-3.0),
}


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.gate = nnx.LinearGeneral(D, (3, 4), rngs=rngs)
        self.up = nnx.Linear(D, 17, rngs=rngs)
        self.down = nnx.Linear(17, D, rngs=rngs)

    def __call__(self, x):
        x = x + self.gate(nnx.tanh(x)).reshape(x.shape)
        return nnx.tanh(x + self.feed(x))

    def feed(self, x):
        return self.down(nnx.tanh(self.up(x)))


class Plain(nnx.Module):
    """One layer, whose root calls another method of its own."""

    def __init__(self, rngs):
        self.layer = Layer(rngs)

    def __call__(self, x):
        return self.run(x)

    def run(self, x):
        return self.layer(x)


class Scanned(nnx.Module):
    """Layers in a scan, rematerialised."""

    def __init__(self, rngs):
        make = nnx.vmap(Layer, in_axes=0, out_axes=0)
        self.layers = make(rngs.split(3))

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


def close(actual, expected, tolerance=2e-6):
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def made(kind):
    """(model of adapters by name, model with their table, the table)."""
    by_name = rx.inject(kind(nnx.Rngs(0)), CONFIGS)
    values = rx.variables(by_name)
    scales = {n: small(values["randlora"][n], i) for i, n in enumerate(CONFIGS)}
    values = {**values, "randlora": scales}
    rx.update(by_name, values)
    mixed, table = rl.adapters.table(values, CONFIGS, capacity=4)
    return by_name, rx.inject(kind(nnx.Rngs(0)), table.config, values=mixed), table


def expected_of(by_name, name, x):
    rx.set_active(by_name, () if name == "__base__" else (name,))
    return nnx.jit(lambda model, x: model(x))(by_name, x)


@pytest.mark.parametrize("kind", [Plain, Scanned])
def test_each_row_is_that_of_its_adapter_and_the_base_s_rows_have_its_bits(kind):
    x = tokens()
    by_name, model, table = made(kind)
    traces = []

    @nnx.jit
    def run(model, x, ids):
        traces.append(1)
        return model(x, adapter_ids=ids)

    y = run(model, x, table.ids(NAMES))
    for row, name in enumerate(NAMES[:4]):
        close(y[row], expected_of(by_name, name, x)[row])
    np.testing.assert_array_equal(y[1], expected_of(by_name, "__base__", x)[1])
    # New entries and other rows: no new trace.
    values, known = rl.adapters.delete(rx.variables(model), table, "code")
    one, config = rl.adapters.select(values, known, "math")
    values, known = rl.adapters.insert(values, known, "physics", one, config)
    rx.update(model, values)
    names = ["physics", "math", "__base__", "chat", "math"]
    again = run(model, x, known.ids(names))
    assert len(traces) == 1
    close(again[0], expected_of(by_name, "math", x)[0])
    np.testing.assert_array_equal(again[2], expected_of(by_name, "__base__", x)[2])


def test_one_step_trains_every_row_s_adapter():
    x, names = tokens(4), ["chat", "math", "chat", "__base__"]
    by_name, model, table = made(Plain)
    probe = normal(8, *x.shape)
    wrt = nnx.DiffState(0, rx.trainable(model))
    loss = lambda model: (model(x, adapter_ids=table.ids(names)) * probe).sum()
    grads = nnx.to_pure_dict(nnx.grad(loss, argnums=wrt)(model))
    grads = {**rx.variables(model), "randlora": grads}
    for name, rows in (("chat", np.array([0, 2])), ("math", np.array([1]))):
        rx.set_active(by_name, (name,))
        alone = nnx.DiffState(0, rx.trainable(by_name, (name,)))
        one = lambda model, rows=rows: (model(x[rows]) * probe[rows]).sum()
        expected = nnx.to_pure_dict(nnx.grad(one, argnums=alone)(by_name))
        actual, _ = rl.adapters.select(grads, table, name)
        leaves = {(*path[:-1], path[-1].partition(":")[0]): leaf
                  for path, leaf in rl.trees.items(expected)}  # fmt: skip
        for path, leaf in rl.trees.items(actual["randlora"]):
            close(leaf, leaves[path], 1e-5)


def test_parts_of_a_model_are_lent_the_numbers_too():
    x = tokens()
    by_name, model, table = made(Plain)
    with rx.lend_bases(model, adapter_ids=table.ids(NAMES)):
        y = nnx.jit(lambda layer, x: layer(x))(model.layer, x)
    close(y, model(x, adapter_ids=table.ids(NAMES)))
    with pytest.raises(ValueError, match=r"adapter_ids=table.ids"):
        model(x)
    with pytest.raises(ValueError, match=r"rl.adapters.table"):
        by_name(x, adapter_ids=table.ids(NAMES))
    with pytest.raises(ValueError, match=r"Linear.*\(2,\).*\(5, 3, 12\)"):
        model(x, adapter_ids=jax.numpy.array([0, 1]))
    assert "randlora_bases" not in vars(model.layer.up)
