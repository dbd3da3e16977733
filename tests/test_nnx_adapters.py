"""Adapters come and go on an injected NNX model, whatever it is and whatever it does meanwhile."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax.nnx import lending
from tests.linen_cases import assert_close, assert_same_bits, normal
from tests.nnx_models import MLP, D, Stack, trained, unchanged_if_it_fails, with_random_scales

X = normal(0, 5, D)
CONFIG = rl.RandLoraConfig(r=2, randlora_alpha=2.0, target_modules="all-linear")


def with_one(make, config=CONFIG, **options):
    return trained(make(), {"a": config}, **options)


class Methods(MLP):
    """Changes itself, or copies itself, in methods of its own."""

    def __init__(self):
        super().__init__(rngs=nnx.Rngs(0))

    def at_strengths(self, x, numbers):
        outputs = []
        for number in numbers:
            rx.set_strength(self, number)
            outputs.append(self.head(self.layers[0](x)))
        return outputs

    @nnx.jit
    def jitted_at(self, x, number):
        rx.set_strength(self, number)
        return self.head(self.layers[0](x))

    def with_scales(self, x, values):
        rx.update(self, values)
        return self.head(self.layers[0](x))

    def copied(self):
        return copy.deepcopy(self)

    def cloned(self):
        return nnx.clone(self)

    def folded(self):
        return rx.merge(self)

    def extended(self):
        rx.insert(self, "b", CONFIG)

    @nnx.jit(donate_argnums=0)
    def donating(self, x):
        return self(x)

    def donates(self, x):
        return self.donating(x)


class Raw(nnx.Module):
    """Its root can be adapted itself, beside its layer."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up, self.w = nnx.Linear(D, D, rngs=rngs), nnx.Param(rngs.normal((D, D)))

    def __call__(self, x):
        return self.up(x) @ self.w[...]


class TestWithinAMethod:
    def test_a_strength_acts_from_there_on(self):
        model = with_one(Methods)
        one, none, twice = model.at_strengths(X, (1.0, 0.0, 2.0))
        base = Methods()
        assert_close(none, base.head(base.layers[0](X)), 1e-6)
        assert not np.allclose(one, none) and not np.allclose(twice, one)
        jitted = with_one(Methods)
        assert_close(jitted.jitted_at(X, 0.0), none, 1e-5)
        assert_close(jitted.jitted_at(X, 2.0), twice, 1e-5)

    def test_other_bases_act_from_there_on(self):
        model, other = with_one(Methods), with_one(Methods, CONFIG.replace(projection_prng_key=1))
        y = model.with_scales(X, rx.variables(other))
        assert_close(y, other.head(other.layers[0](X)), 1e-6)

    @pytest.mark.parametrize("copied", ["copied", "cloned"])
    def test_a_copy_lives_by_itself(self, copied):
        model = with_one(Methods)
        other = getattr(model, copied)()
        y = other(X)
        assert_same_bits(y, model(X))
        rx.set_strength(other, 0.0)
        assert_close(other(X), Methods()(X), 1e-6)
        assert_same_bits(model(X), y)

    def test_adapters_can_be_merged_and_inserted(self):
        model, expected = with_one(Methods), with_one(Methods)
        assert_close(model.folded()(X), expected(X), 1e-5)
        assert type(model) is Methods
        assert all(layer.users == 0 for layer in lending._layers.values())
        rx.inject(model, {"a": CONFIG})
        y = model(X)
        model.extended()
        assert_same_bits(model(X), y)
        assert rx.variables(model)["randlora"].keys() == {"a", "b"}

    def test_a_method_that_donates_can_be_called_by_another(self):
        model, y = with_one(Methods), with_one(Methods)(X)
        rx.set_strength(model, jnp.ones(()))
        for _ in range(2):
            assert_close(model.donates(X), y, 1e-5)

    def test_a_call_that_fails_takes_back_what_it_lent(self):
        model = with_one(Methods)
        kernel = model.head.kernel
        del model.head.kernel
        with pytest.raises(AttributeError):
            model(X)
        model.head.kernel = kernel
        assert not [m for _, m in nnx.iter_modules(model) if lending.LOAN in vars(m)]
        rx.set_strength(model, 0.0)
        assert_close(model(X), Methods()(X), 1e-6)


class TestInserting:
    def test_after_the_base_was_cast_no_update_is_added_twice(self):
        model = with_one(Methods)
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Param) and not isinstance(variable, rx.RandLoraParam):
                variable.set_value(variable.get_value().astype(jnp.bfloat16))
        x = X.astype(jnp.bfloat16)
        y = model(x)
        rx.insert(model, "b", CONFIG)
        assert_same_bits(model(x), y)
        rx.delete(model, "b")
        assert_same_bits(model(x), y)

    def test_at_a_root_that_was_not_adapted(self):
        some = CONFIG.replace(target_modules=["up"])
        model = with_one(Raw, some)
        whole = rx.inject(Raw(), {"a": some, "b": CONFIG}, parameters={"w": (0,)})
        y = model(X)
        rx.insert(model, "b", CONFIG, parameters={"w": (0,)})
        assert_same_bits(model(X), y)
        assert type(model) is type(whole)
        rx.set_active(model, None)
        y = with_random_scales(model)(X)
        assert_close(rx.merge(model)(X), y, 1e-5)
        assert type(model) is Raw

    def test_what_was_named_by_a_regular_expression_can_be_again(self):
        class Outer(nnx.Module):
            def __init__(self):
                self.r = Raw()

            def __call__(self, x):
                return self.r(x)

        config = CONFIG.replace(target_modules=r".*r\.(w|up).*")
        model = with_one(Outer, config, parameters={"w": (0,)})
        rx.insert(model, "b", config, parameters={"w": (0,)})
        assert rx.variables(model)["randlora"]["b"].keys() == {"r"}

    @pytest.mark.parametrize("first", ["wide", "square"])
    def test_of_sizes_that_need_larger_bases_than_either_has(self, first):
        class Sizes(nnx.Module):
            def __init__(self):
                rngs = nnx.Rngs(0)
                self.wide = nnx.Linear(4, 30, rngs=rngs)
                self.square = nnx.Linear(15, 15, rngs=rngs)

        (second,) = {"wide", "square"} - {first}
        configs = {n: CONFIG.replace(target_modules=[n]) for n in (first, second)}
        together = rx.variables(rx.inject(Sizes(), configs))
        model = rx.inject(Sizes(), {first: configs[first]})
        rx.insert(model, second, configs[second])
        assert_same_bits(rx.variables(model), together)

    def test_bases_that_no_seed_draws_serve_another_adapter(self):
        model = with_one(Methods)
        values = rx.variables(model)
        foreign = jax.tree.map(lambda a: a * 0.5, values["randlora_bases"])
        model = rx.inject(Methods(), {"a": CONFIG}, values={**values, "randlora_bases": foreign})
        rx.insert(model, "b", CONFIG)
        assert_same_bits(rx.variables(model)["randlora_bases"], foreign)

    def test_bases_of_another_dtype_are_refused(self):
        model = rx.inject(Methods(), {"a": CONFIG}, bases_dtype=jnp.bfloat16)
        loaded = rx.variables(rx.inject(Methods(), CONFIG))
        with (
            unchanged_if_it_fails(model),
            pytest.raises(ValueError, match=r"float32, and .*bfloat"),
        ):
            rx.insert(model, "b", CONFIG, values=loaded)
        rx.insert(model, "b", CONFIG)
        assert model.randlora_B.get_value().dtype == jnp.bfloat16

    def test_on_an_abstract_model_and_under_jit(self):
        def make():
            model = rx.inject(Methods(), {"a": CONFIG.replace(target_modules=["up"])})
            rx.insert(model, "b", CONFIG)
            return model

        real = make()
        shapes = lambda model: jax.tree.map(lambda a: (a.shape, a.dtype), rx.variables(model))
        abstract = nnx.eval_shape(lambda: Methods())
        rx.inject(abstract, {"a": CONFIG.replace(target_modules=["up"])})
        rx.insert(abstract, "b", CONFIG)
        assert shapes(abstract) == shapes(nnx.jit(make)()) == shapes(real)

    def test_bases_stay_where_they_are(self):
        mesh = jax.make_mesh((8,), ("x",))
        model = with_one(Methods)
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        nnx.update(model, jax.device_put(nnx.state(model), everywhere))
        before = model.randlora_B.get_value()
        rx.insert(model, "b", CONFIG)
        assert model.randlora_B.get_value() is before
        small = rx.inject(Methods(), {"a": CONFIG.replace(target_modules=["head"])})
        nnx.update(small, jax.device_put(nnx.state(small), everywhere))
        rx.insert(small, "b", CONFIG)
        assert small.randlora_B.get_value().sharding.is_equivalent_to(everywhere, 3)

    def test_dropout_comes_and_goes_with_its_adapter(self):
        dropped = CONFIG.replace(randlora_dropout=0.5)
        model = rx.inject(Methods(), {"a": CONFIG})
        graphdef, names = nnx.graphdef(model), set(vars(model.head))
        rx.insert(model, "b", dropped, rngs=nnx.Rngs(0))
        rx.set_active(model, ("b",))
        with_random_scales(model)
        assert not np.allclose(model(X), model(X))
        rx.delete(model, "b")
        rx.set_active(model, None)
        assert set(vars(model.head)) == names and nnx.graphdef(model) == graphdef
        late = with_one(Methods, dropped)  # it has no stream yet
        rx.insert(late, "b", dropped, rngs=nnx.Rngs(0))
        assert not np.allclose(late(X), late(X))

    @pytest.mark.parametrize("stack", [False, True])
    def test_an_optimizer_goes_on_with_its_own_adapter(self, stack):
        make = (lambda: Stack(rngs=nnx.Rngs(0))) if stack else Methods
        model = with_one(make)
        wrt = rx.trainable(model)
        optimizer = nnx.Optimizer(model, optax.chain(optax.trace(0.9), optax.sgd(0.1)), wrt=wrt)
        rx.insert(model, "b", CONFIG.replace(init_weights=False))
        before = rx.variables(model)["randlora"]
        gradients = nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, gradients)
        after = rx.variables(model)["randlora"]
        assert_same_bits(after["b"], before["b"])
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), after["a"], before["a"])
        assert all(jax.tree.leaves(moved))


def test_one_adapter_by_name_trains_what_its_config_says():
    config = CONFIG.replace(bias="all", modules_to_save=["head"])
    model = rx.inject(Methods(), {"a": config})
    state = nnx.state(model, rx.trainable(model))
    found = {str(path[-1]).partition(":")[0] for path, _ in nnx.to_flat_state(state)}
    assert found == {"randlora_lambda", "randlora_gamma", "bias", "kernel"}
    trainable, _ = rl.split(rx.variables(model), {"a": config})
    assert trainable["params"].keys() == {"head", "layers"}
    assert not nnx.to_flat_state(nnx.state(model, rx.trainable(model, ())))


def test_values_that_are_of_another_model_change_nothing():
    config = CONFIG.replace(bias="all")
    values = rx.variables(rx.inject(Methods(), config))
    for params in ({"head": {"bias": jnp.ones(3)}}, {"nowhere": {"bias": jnp.ones(3)}}):
        model = Methods()
        with unchanged_if_it_fails(model), pytest.raises(ValueError, match="of another model"):
            rx.inject(model, config, values={**values, "params": params})
    model = rx.inject(Methods(), {"a": CONFIG})
    with unchanged_if_it_fails(model), pytest.raises(ValueError, match="no 'randlora_bases'"):
        rx.insert(model, "b", CONFIG, values={"randlora": values["randlora"]})
