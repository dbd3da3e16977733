"""An injected NNX model can be copied, sent and called as any other; a failed inject is none."""

import copy
import functools
import pickle

import jax
import pytest
from flax import nnx

from randlora_jax.nnx import inject, merge, remove, variables
from tests.linen_cases import assert_close, assert_same_bits
from tests.nnx_models import CONFIG, MLP, D, Stack, trained, unchanged_if_it_fails, x


class Model(MLP):
    """With methods of all kinds, and a child class that registers its own and wants an argument."""

    children = ()

    def __init_subclass__(cls, tag, **options):
        super().__init_subclass__(**options)
        Model.children = (*Model.children, cls)

    def __init__(self):
        super().__init__(rngs=nnx.Rngs(0))

    @nnx.jit
    def jitted(self, x):
        return self.head(self.layers[0](x))

    @nnx.jit(donate_argnums=0)
    def donating(self, x):
        return self.head(self.layers[0](x))

    @functools.partial(nnx.jit, donate_argnums=0, graph=False)
    def donating_a_tree(self, x):
        return self.head(self.layers[0](x))

    def through(self, x):
        for layer in self.layers:
            x = layer(x)
            yield x
        yield self.head(x)


X = x()


def test_a_class_is_not_told_of_ours():
    inject(Model(), CONFIG)
    assert Model.children == ()


@pytest.mark.parametrize("refused", ["randlora_gamma", "randlora_layer", "randlora_B"])
def test_an_inject_that_fails_midway_changes_nothing(refused):
    class Refuses:
        def __setattr__(self, name, value):
            if name == refused:
                raise AttributeError(name)
            super().__setattr__(name, value)

    class Layer(Refuses, nnx.Linear):
        pass

    class Root(Refuses, MLP):
        def __init__(self):
            super().__init__(rngs=nnx.Rngs(0))
            self.head = Layer(D, D, rngs=nnx.Rngs(1))

    model = Root()
    with unchanged_if_it_fails(model), pytest.raises(AttributeError, match=refused):
        inject(model, CONFIG)
    left = [name for _, module in nnx.iter_modules(model) for name in vars(module)]
    assert not [name for name in left if name.startswith("randlora")]


COPIES = {
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "copied deeply": copy.deepcopy,
    "cloned": nnx.clone,
    "split and merged": lambda model: nnx.merge(*jax.tree.map(lambda a: a, nnx.split(model))),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same_and_lives_by_itself(make):
    model = trained(Model())
    y, kernel = model(X), model.head.kernel.get_value()
    other = make(model)
    assert (other(X) == y).all() and isinstance(other, Model) and type(other) is type(model)
    assert (other.layers[0].up(X) == model.layers[0].up(X)).all()
    merge(other)
    assert type(other) is Model and not (other.head.kernel.get_value() == kernel).all()
    assert (model(X) == y).all() and model.head.kernel.get_value() is kernel
    assert_same_bits(variables(make(model)), variables(model))


class Made(MLP):
    """Says itself how it is pickled."""

    def __reduce__(self):
        return made, (3, None)


def made(layers, nothing):
    assert nothing is None
    return Made(layers, rngs=nnx.Rngs(0))


class Single(MLP):
    """One that there is by name."""

    def __reduce__(self):
        return "SINGLE"


SINGLE = Single(rngs=nnx.Rngs(0))


def test_a_class_that_says_how_it_is_pickled_is_heard():
    model = trained(Made(2, rngs=nnx.Rngs(0)))
    assert len(pickle.loads(pickle.dumps(model)).layers) == 3
    trained(SINGLE)
    try:
        assert pickle.loads(pickle.dumps(SINGLE)) is SINGLE
    finally:
        remove(SINGLE)


class Narrow(type(nnx.Module)):
    """A metaclass without options, as people write them."""

    def __new__(mcs, name, bases, members):
        return super().__new__(mcs, name, bases, members)

    def __init__(cls, name, bases, members):
        super().__init__(name, bases, members)


class Decorator:
    """A decorator that is a descriptor, and wants to know of which class."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __get__(self, obj, owner):
        assert issubclass(owner, nnx.Module)
        return functools.partial(self.function, obj)


def test_metaclasses_and_decorators_of_users():
    class Layer(nnx.Linear, metaclass=Narrow):
        @Decorator
        def twice(self, x):
            return 2 * self(x)

    class Root(nnx.Module, metaclass=Narrow):
        def __init__(self):
            self.layer = Layer(D, D, rngs=nnx.Rngs(0))

        @Decorator
        def run(self, x):
            return self.layer.twice(x)

    model = trained(Root())
    y = model.run(X)
    assert_close(merge(model).run(X), y, 1e-5)


def test_a_part_keeps_its_model_when_a_shallow_copy_goes():
    model = trained(Model())
    y = model.head(X)
    other = copy.copy(model)
    other(X)
    del other
    assert (model.head(X) == y).all()


def test_a_linear_layer_that_is_the_whole_model_can_be_pickled():
    model = trained(nnx.Linear(D, 3, rngs=nnx.Rngs(0)))
    other = pickle.loads(pickle.dumps(model))
    assert (other(X) == model(X)).all()
    assert type(remove(other)) is nnx.Linear


class TestDonation:
    def test_a_method_that_donates_its_model(self):
        model, rival = trained(Model()), trained(Model())
        y = rival.jitted(X)
        for _ in range(2):
            assert (model.donating(X) == y).all()
        assert (model(X) == rival(X)).all()

    def test_a_function_that_donates_its_model(self):
        model, call = trained(Model()), nnx.jit(lambda model, x: model(x), donate_argnums=0)
        y = trained(Model())(X)
        for _ in range(2):
            assert_close(call(model, X), y, 1e-5)

    def test_in_tree_mode_a_method_is_refused_and_a_function_works(self):
        model = trained(Model())
        y = model(X)
        with pytest.raises(ValueError, match=r"'donating_a_tree' donates its model.*a function"):
            model.donating_a_tree(X)
        call = nnx.jit(lambda model, x: model(x), donate_argnums=0, graph=False)
        for _ in range(2):
            assert_close(call(model, X), y, 1e-5)

    def test_a_method_of_a_model_with_stacks_tells_what_it_costs(self):
        class Donating(Stack):
            @nnx.jit(donate_argnums=0)
            def step(self, x):
                return self(x)

        model = trained(Donating(rngs=nnx.Rngs(0)))
        y = model(X)
        with pytest.warns(UserWarning, match="'step' donates its model.*compile anew"):
            assert_close(model.step(X), y, 1e-5)


class TestWhatWasBoundBefore:
    def test_methods_and_generators_have_the_updates(self):
        model = Model()
        bound, generator, jitted = model.features, model.through(X), model.jitted
        part = model.layers[1]
        trained(model)
        assert (bound(X) == model.features(X)).all()
        assert (list(generator)[-1] == model(X)).all()
        assert (part(X) == model.layers[1](X)).all()
        with pytest.raises(RuntimeError, match="was called outside of its model"):
            jitted(X)  # it makes a copy of the model, of which no method was called
        assert_close(model.jitted(X), model.head(model.layers[0](X)), 1e-5)

    def test_a_generator_within_jit_has_them(self):
        model = trained(Model())
        last = nnx.jit(lambda model, x: list(model.through(x))[-1])
        assert_close(last(model, X), model(X), 1e-5)
