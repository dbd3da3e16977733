"""Adapters are inserted, deleted, trained by name and made stronger alike in Linen and in NNX."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import adapters
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora
from tests.linen_cases import assert_close, assert_same_bits, randomised
from tests.nnx_models import trained, unchanged_if_it_fails
from tests.refused_models import Model, NnxModel, X

UP = rl.RandLoraConfig(r=3, randlora_alpha=2.0, target_modules=["up"])
DOWN = UP.replace(target_modules=["down", "head"], randlora_alpha=5.0)
CONFIGS = {"chat": UP, "code": DOWN}


def of_linen(configs=CONFIGS):
    model = RandLora(Model(), configs)
    variables = model.adapt(Model().init(jax.random.key(0), X), X)
    return model, {**variables, "randlora": randomised(variables["randlora"], 7)}


def of_nnx(configs=CONFIGS):
    return trained(NnxModel(), configs)


def scaled(config, number):
    return config.replace(randlora_alpha=config.randlora_alpha * number)


def tracing(function):
    """A jitted function, and a list with an entry for each time it was traced."""
    traced = []

    def run(*args):
        traced.append(True)
        return function(*args)

    return run, traced


STRENGTHS = {"chat": 0.25, "code": -1.5}
STRONGER = {name: scaled(config, STRENGTHS[name]) for name, config in CONFIGS.items()}


class TestStrength:
    def test_of_linen_is_another_alpha(self):
        model, variables = of_linen()
        stronger = adapters.with_strength(variables, CONFIGS, STRENGTHS)
        expected = RandLora(Model(), STRONGER)
        assert_close(model.apply(stronger, X), expected.apply(variables, X), 1e-6)
        assert_close(model.merge(stronger), expected.merge(variables), 1e-6)
        only = adapters.with_strength(variables, CONFIGS, {"code": 0.0})
        assert_close(model.apply(only, X), model.clone(active=("chat",)).apply(variables, X), 1e-6)

    def test_of_nnx_is_another_alpha(self, tmp_path):
        model, expected = of_nnx(), of_nnx(STRONGER)
        saved = rx.variables(model)
        rx.set_strength(model, STRENGTHS)
        assert_close(model(X), expected(X), 1e-6)
        assert_same_bits(rx.variables(model), saved)
        assert_close(rx.merge(model)(X), expected(X), 1e-5)
        assert not [name for name in vars(model) if name.startswith("randlora")]

    def test_it_can_be_traced_and_changed_without_tracing_anew(self):
        model, variables = of_linen()
        run, traced = tracing(
            lambda s: model.apply(adapters.with_strength(variables, CONFIGS, {"chat": s}), X)
        )
        run = jax.jit(run)
        for number in (0.5, 2.0):
            expected = adapters.with_strength(variables, CONFIGS, {"chat": number})
            assert_close(run(number), model.apply(expected, X), 1e-6)
        assert len(traced) == 1

        model = of_nnx()
        run, traced = tracing(lambda model: model(X))
        run = nnx.jit(run)
        for number in (0.5, 2.0, 1.0):
            rx.set_strength(model, number)
            assert_close(run(model), model(X), 1e-6)
        assert len(traced) == 1
        assert_close(model(X), of_nnx()(X), 1e-6)

    def test_of_one_adapter_it_is_a_number(self):
        model, variables = of_linen(UP)
        stronger = adapters.with_strength(variables, UP, 0.5)
        assert_close(
            model.apply(stronger, X), RandLora(Model(), scaled(UP, 0.5)).apply(variables, X), 1e-6
        )
        model = of_nnx(UP)
        rx.set_strength(model, 0.5)
        assert_close(model(X), of_nnx(scaled(UP, 0.5))(X), 1e-6)

    @pytest.mark.parametrize(
        ("config", "strength", "message"),
        [
            (CONFIGS, {"chta": 1.0}, r"names \['chta'\], the adapters are \['chat', 'code'\]"),
            (UP, {"chat": 1.0}, "the one adapter has no name"),
            (CONFIGS, {"chat": [1.0, 2.0]}, r"must be a number, got \[1.0, 2.0\] for 'chat'"),
            (UP, 1j, "must be a number, got 1j"),
        ],
    )
    def test_what_is_no_strength_is_refused(self, config, strength, message):
        _, variables = of_linen(config)
        with pytest.raises(ValueError, match=message):
            adapters.with_strength(variables, config, strength)
        model = of_nnx(config)
        with unchanged_if_it_fails(model), pytest.raises(ValueError, match=message):
            rx.set_strength(model, strength)


class TestTrainingOneByName:
    def step(self, loss, trainable):
        tx = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1))
        updates, _ = tx.update(jax.grad(loss)(trainable), tx.init(trainable), trainable)
        return optax.apply_updates(trainable, updates)

    def test_in_linen(self):
        model, variables = of_linen()
        trainable, frozen = rl.split(variables, CONFIGS, ("chat",))
        assert set(trainable) == {"randlora"} and set(trainable["randlora"]) == {"chat"}
        loss = lambda trainable: jnp.sum(model.apply(rl.combine(trainable, frozen), X) ** 2)
        after = rl.combine(self.step(loss, trainable), frozen)
        assert_same_bits(after["randlora"]["code"], variables["randlora"]["code"])
        moved = jax.tree.map(lambda a, b: jnp.any(a != b), after, variables)["randlora"]["chat"]
        assert all(jax.tree.leaves(moved))
        both, _ = rl.split(variables, CONFIGS)
        assert set(both["randlora"]) == {"chat", "code"}

    @pytest.mark.parametrize("by", ["name", "activity"])
    def test_in_nnx(self, by):
        model = of_nnx()
        before = rx.variables(model)
        if by == "activity":
            rx.set_active(model, ("chat",))
        wrt = rx.trainable(model, ("chat",) if by == "name" else None)
        optimizer = nnx.Optimizer(
            model, optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), wrt=wrt
        )
        gradients = nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradients)
        after = rx.variables(model)
        assert_same_bits(after["randlora"]["code"], before["randlora"]["code"])
        moved = jax.tree.map(lambda a, b: jnp.any(a != b), after, before)["randlora"]["chat"]
        assert all(jax.tree.leaves(moved))

    def test_partition_by_name(self):
        _, variables = of_linen()
        tx = rl.partition(optax.sgd(1.0), variables, CONFIGS, ("code",))
        updates, _ = tx.update(variables, tx.init(variables))
        assert not any(np.any(a) for a in jax.tree.leaves(updates["randlora"]["chat"]))
        assert all(np.any(a) for a in jax.tree.leaves(updates["randlora"]["code"]))

    def test_unknown_names_are_refused(self):
        _, variables = of_linen()
        for use in (
            lambda: rl.split(variables, CONFIGS, ("chta",)),
            lambda: rl.labels(variables, CONFIGS, ("chta",)),
            lambda: rx.trainable(of_nnx(), ("chta",)),
        ):
            with pytest.raises(ValueError, match=r"names \['chta'\], the adapters are"):
                use()
        with pytest.raises(TypeError, match=r"named in a tuple, as in \('chat',\)"):
            rl.split(variables, CONFIGS, "chat")


@pytest.mark.parametrize("first", ["chat", "code"])
class TestInsertingAndDeleting:
    def test_in_nnx_is_as_injecting_them_together(self, first):
        (second,) = set(CONFIGS) - {first}
        together, model = of_nnx(), rx.inject(NnxModel(), {first: CONFIGS[first]})
        values = rx.variables(together)
        rx.update(model, {**rx.variables(model), "randlora": {first: values["randlora"][first]}})
        y = model(X)
        rx.insert(model, second, CONFIGS[second])
        assert (model(X) == y).all()
        rx.set_active(model, None)
        assert (model(X) == y).all()  # a new update is zero
        rx.update(model, {**rx.variables(model), "randlora": values["randlora"]})
        assert_close(model(X), together(X), 1e-6)
        rx.set_strength(model, {first: 2.0, second: 3.0})
        rx.delete(model, second)
        rx.set_strength(model, 1.0)
        assert_close(model(X), y, 1e-6)
        assert set(rx.variables(model)["randlora"]) == {first}
        assert not [k for m in nnx.iter_modules(model) for k in vars(m[1]) if f":{second}" in k]
        assert_close(rx.merge(model)(X), y, 1e-5)

    def test_a_loaded_one(self, first, tmp_path):
        _, variables = of_linen()
        one, config = adapters.select(variables, CONFIGS, first)
        rl.save_adapter(tmp_path / "a", one, config)
        model = rx.inject(NnxModel(), {"other": UP})
        loaded, config = rl.load_adapter(tmp_path / "a", rx.variables(model))
        with pytest.raises(ValueError, match=r"has the adapters \['other'\].*insert\(model, name"):
            rx.load_adapter(tmp_path / "a", model)
        rx.insert(model, first, config, values=loaded)
        rx.set_active(model, (first,))
        assert_close(model(X), rx.inject(NnxModel(), config, values=one | loaded)(X), 1e-6)

    def test_in_linen_deleting_is_the_inverse_of_inserting(self, first):
        (second,) = set(CONFIGS) - {first}
        _, variables = of_linen()
        one, config = adapters.select(variables, CONFIGS, second)
        rest, configs = adapters.delete(variables, CONFIGS, second)
        assert set(configs) == set(rest["randlora"]) == {first}
        both, configs = adapters.insert(rest, configs, second, one, config)
        assert configs == CONFIGS
        assert_same_bits(both, variables)

    def test_what_can_not_be_is_refused_and_changes_nothing(self, first):
        model = rx.inject(NnxModel(), {first: CONFIGS[first]})
        (second,) = set(CONFIGS) - {first}
        other = CONFIGS[second]
        given = {"randlora": {}, "randlora_bases": rx.variables(model)["randlora_bases"]}
        for name, config, options, message in (
            (first, other, {}, "there is an adapter"),
            (second, other.replace(r=2), {}, "r must be the same for all adapters"),
            (second, other.replace(target_modules=["dwon"]), {}, "'dwon' matches no module"),
            (second, other, {"values": given}, "has the shape None in what is given"),
        ):
            with unchanged_if_it_fails(model), pytest.raises(ValueError, match=message):
                rx.insert(model, name, config, **options)
        with unchanged_if_it_fails(model), pytest.raises(ValueError, match="the only adapter"):
            rx.delete(model, first)
        with unchanged_if_it_fails(model), pytest.raises(ValueError, match="no adapter 'x'"):
            rx.delete(model, "x")
        alone = rx.inject(NnxModel(), UP)
        with pytest.raises(TypeError, match=r"inject\(model, \{'name': config\}\)"):
            rx.insert(alone, "b", UP)


def test_merging_is_undone_bit_for_bit():
    model = of_nnx()
    values, y, base = rx.variables(model), model(X), dict(rx.variables(model)["params"]["head"])
    rx.merge(model)
    assert not (model.head.kernel.get_value() == base["kernel"]).all()
    rx.inject(model, CONFIGS, values=values)
    assert_same_bits(rx.variables(model), values)
    assert (model(X) == y).all()
