"""What trains, what is frozen, and that optimizers keep to it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora
from tests.compiling import shipped_jit


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(13, name="up")(x))
        x = nn.LayerNorm(name="norm")(nn.relu(nn.Dense(11, name="mid")(x)))
        return nn.Dense(5, name="head")(x)


def make(**values):
    """(config, model, variables, x), no scale or bias zero."""
    config = rl.RandLoraConfig(**{"r": 3, "target_modules": ["up", "mid"], **values})
    model, x = RandLora(MLP(), config), jax.random.normal(jax.random.key(1), (4, 7))
    variables = model.init(jax.random.key(0), x)
    leaves = {
        path: leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape)
        if path[0] != "randlora_bases"
        else leaf
        for i, (path, leaf) in enumerate(trees.items(variables))
    }
    return config, model, trees.build(leaves), x


SCALES = {
    f"randlora.{layer}.{name}": name
    for layer in ("up", "mid")
    for name in ("randlora_lambda", "randlora_gamma")
}
SAVED_HEAD = {f"params.head.{name}": "modules_to_save" for name in ("kernel", "bias")}


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, {}),
        ({"bias": "randlora_only"}, {f"params.{m}.bias": "bias" for m in ("up", "mid")}),
        (
            {"bias": "all"},
            {f"params.{m}.bias": "bias" for m in ("up", "mid", "norm", "head")},
        ),
        ({"modules_to_save": ["head"]}, SAVED_HEAD),
        (
            {"bias": "all", "modules_to_save": ["head"]},
            {f"params.{m}.bias": "bias" for m in ("up", "mid", "norm")} | SAVED_HEAD,
        ),
        (
            {"bias": "randlora_only", "modules_to_save": ["norm"]},
            {f"params.{m}.bias": "bias" for m in ("up", "mid")}
            | {f"params.norm.{n}": "modules_to_save" for n in ("scale", "bias")},
        ),
    ],
    ids=str,
)
def test_labels_name_what_trains_and_freeze_the_rest(values, expected):
    config, _, variables, _ = make(**values)
    labels = {".".join(p): label for p, label in trees.items(rl.labels(variables, config))}
    assert set(labels) == {".".join(p) for p, _ in trees.items(variables)}
    assert {p: label for p, label in labels.items() if label != "frozen"} == SCALES | expected


EVERYTHING = {"bias": "all", "modules_to_save": ["head"]}


@pytest.mark.parametrize("values", [{}, {"bias": "randlora_only"}, EVERYTHING], ids=str)
def test_split_divides_by_label(values):
    config, _, variables, _ = make(**values)
    trainable, frozen = rl.split(variables, config)
    labels = dict(trees.items(rl.labels(variables, config)))
    assert {p for p, _ in trees.items(frozen)} == {p for p, v in labels.items() if v == "frozen"}
    assert {p for p, _ in trees.items(trainable)} == {p for p, v in labels.items() if v != "frozen"}


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=str)
def test_combine_undoes_split_with_the_same_arrays(values):
    config, _, variables, _ = make(**values)
    combined = rl.combine(*rl.split(variables, config))
    assert jax.tree.structure(combined) == jax.tree.structure(variables)
    for (path, one), (_, other) in zip(trees.items(combined), trees.items(variables), strict=True):
        assert one is other, path


def test_combine_takes_what_was_trained():
    config, _, variables, _ = make()
    trainable, frozen = rl.split(variables, config)
    moved = jax.tree.map(lambda a: a + 1, trainable)
    combined = rl.combine(moved, frozen)
    assert combined["randlora"]["up"]["randlora_gamma"] is moved["randlora"]["up"]["randlora_gamma"]
    assert combined["params"]["up"]["kernel"] is variables["params"]["up"]["kernel"]


def loss(model, variables, x):
    return jnp.mean(jnp.square(model.apply(variables, x) - jnp.sin(jnp.arange(5.0))[None]))


def update(tx, grads, state, params):
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=str)
def test_optimizer_state_holds_nothing_for_what_is_frozen(values):
    config, _, variables, _ = make(**values)
    trainable, _ = rl.split(variables, config)
    whole = rl.partition(optax.scale_by_adam(), variables, config).init(variables)
    moments = 2 * count(trainable)
    steps = len(set(jax.tree.leaves(rl.labels(variables, config))) - {"frozen"})
    assert count(whole) == moments + steps
    assert count(optax.scale_by_adam().init(trainable)) == moments + 1


@pytest.mark.parametrize("values", [{}, {"bias": "randlora_only"}, EVERYTHING], ids=str)
def test_training_the_whole_tree_moves_what_trains_and_nothing_else(values):
    config, model, variables, x = make(**values)
    tx = rl.partition(optax.adamw(1e-2, weight_decay=0.1), variables, config)

    @jax.jit
    def step(variables, state):
        grads = jax.grad(lambda v: loss(model, v, x))(variables)
        return update(tx, grads, state, variables)

    trained, state = variables, tx.init(variables)
    for _ in range(3):
        trained, state = step(trained, state)
    labels = dict(trees.items(rl.labels(variables, config)))
    for path, leaf in trees.items(trained):
        same = np.asarray(leaf) == np.asarray(dict(trees.items(variables))[path])
        assert same.all() if labels[path] == "frozen" else not same.any(), path


def test_training_the_split_tree_moves_every_leaf_and_lowers_the_loss():
    config, model, variables, x = make(**EVERYTHING, randlora_alpha=6)
    trainable, frozen = rl.split(variables, config)
    tx = optax.adamw(1e-2)

    @jax.jit
    def step(trainable, state):
        value, grads = jax.value_and_grad(lambda t: loss(model, rl.combine(t, frozen), x))(
            trainable
        )
        return *update(tx, grads, state, trainable), value

    trained, state, values = trainable, tx.init(trainable), []
    for _ in range(20):
        trained, state, value = step(trained, state)
        values.append(value)
    assert values[-1] < 0.8 * values[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), trained, trainable)
    assert all(jax.tree.leaves(moved))


def test_each_label_gets_its_own_transformation():
    config, _, variables, _ = make(**EVERYTHING)
    rates = {"randlora_lambda": 1.0, "randlora_gamma": 2.0, "bias": 3.0, "modules_to_save": 4.0}
    tx = rl.partition({k: optax.sgd(v) for k, v in rates.items()}, variables, config)
    updates, _ = tx.update(variables, tx.init(variables), variables)
    gradients, labels = dict(trees.items(variables)), rl.labels(variables, config)
    labels = dict(trees.items(labels))
    for path, update in trees.items(updates):
        rate = rates.get(labels[path], 0.0)
        np.testing.assert_allclose(update, -rate * gradients[path], rtol=1e-6, err_msg=str(path))


def test_a_missing_transformation_is_named():
    config, _, variables, _ = make(**EVERYTHING)
    some = {"randlora_lambda": optax.sgd(1.0), "modules_to_save": optax.sgd(1.0)}
    with pytest.raises(ValueError, match=r"transforms has none for \['bias', 'randlora_gamma'\]"):
        rl.partition(some, variables, config)


def test_split_and_labels_work_on_shapes():
    config, model, variables, x = make(**EVERYTHING)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert rl.labels(shapes, config) == rl.labels(variables, config)
    trainable, _ = rl.split(shapes, config)
    assert jax.tree.structure(trainable) == jax.tree.structure(rl.split(variables, config)[0])


def test_a_step_over_the_split_tree_that_logs_gradients_costs_less():
    config = rl.RandLoraConfig(r=8, target_modules=["up", "mid"])
    model, x = RandLora(MLP(), config), jax.ShapeDtypeStruct((16, 64), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def flops(split):
        def logged(trainable, frozen, x):
            objective = lambda t: loss(model, rl.combine(t, frozen), x)
            grads = jax.grad(objective)(trainable)
            return grads["randlora"], optax.tree.norm(grads)

        trees_ = rl.split(variables, config) if split else (variables, {})
        return shipped_jit(logged).lower(*trees_, x).compile().cost_analysis()["flops"]

    assert flops(split=True) < 0.9 * flops(split=False)
