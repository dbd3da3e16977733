"""What goes wrong is told before any work, by the field and the name, in both front ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze
from flax.errors import ScopeParamShapeError

import randlora_jax as rl
from randlora_jax.linen import RandLora
from tests.linen_cases import assert_same_bits, randomised
from tests.refused_models import ALL, Model, X, in_place, linen

FRONT_ENDS = pytest.mark.parametrize("adapt", [linen, in_place])


@FRONT_ENDS
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_modules": ["up", "dwon"]}, "target_modules: 'dwon' .*'layers_0.down'"),
        ({"exclude_modules": ["haed"]}, "exclude_modules: 'haed' .*'head'"),
        ({"exclude_modules": r".*\.upp"}, r"exclude_modules: '\.\*\\\\\.upp' matches no module"),
        ({"modules_to_save": ["haed"]}, "modules_to_save: 'haed' .*'head'"),
        ({"modules_to_save": ["head", "classifier"]}, "modules_to_save: 'classifier' matches no"),
        (
            {"layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]},
            "layers_pattern: 'blocks' matches no module",
        ),
    ],
)
def test_a_name_that_matches_nothing_is_told_with_the_nearest(adapt, values, message):
    with pytest.raises(ValueError, match=message):
        adapt(rl.RandLoraConfig(**ALL | values))


@FRONT_ENDS
def test_names_that_mean_something_are_taken(adapt):
    config = rl.RandLoraConfig(
        r=3,
        target_modules=["up", "layers_0.down"],
        exclude_modules=["layers_1.up"],
        modules_to_save=["head"],
    )
    found = adapt(config)["randlora"]
    assert {name: set(inside) for name, inside in found.items()} == {"layers_0": {"up", "down"}}


class Idle(nn.Module):
    """Holds layers that it does not run: one by a nested apply, as tied heads are, others not."""

    def setup(self):
        self.up, self.head = nn.Dense(7), nn.Dense(5, use_bias=False)
        self.spare = [nn.Dense(2), nn.Dense(3)]

    def __call__(self, x):
        h, kernel = self.up(x), self.up.variables["params"]["kernel"].T
        return self.head.apply({"params": {"kernel": kernel}}, h)


@pytest.mark.parametrize("names", [["head"], ["spare_1", "head"], r"head|spare_\d"])
def test_layers_that_do_not_run_can_be_excluded(names):
    base = Idle().init(jax.random.key(0), X)
    config = rl.RandLoraConfig(**ALL)
    adapted = RandLora(Idle(), config.replace(exclude_modules=names)).adapt(base, X)
    assert set(adapted["randlora"]) == {"up"}


@pytest.mark.parametrize("names", [["head"], ["spare_1", "head"]])
def test_layers_that_do_not_run_and_have_no_parameters_can_not_be_saved_whole(names):
    base = Idle().init(jax.random.key(0), X)
    config = rl.RandLoraConfig(**ALL, modules_to_save=names)
    with pytest.raises(ValueError, match=r"modules_to_save: .* matches no module"):
        RandLora(Idle(), config).adapt(base, X)


@FRONT_ENDS
def test_the_heads_that_peft_names_by_itself_need_not_be_there(adapt):
    names = {"modules_to_save": ["head", "classifier", "score"], "task_type": "SEQ_CLS"}
    assert set(adapt(rl.RandLoraConfig(**ALL | names))["randlora"]) == {"layers_0", "layers_1"}


@FRONT_ENDS
def test_a_raw_parameter_that_is_not_there_is_told_with_the_nearest(adapt):
    with pytest.raises(ValueError, match=r"parameters: 'scales' matches no parameter.*'scale'"):
        adapt(rl.RandLoraConfig(**ALL), parameters={"scales": (0,)})


@FRONT_ENDS
@pytest.mark.parametrize("axes", [(-1,), (), (0, 0), (2,), (0, 1), (0.5,), "0"])
def test_axes_that_a_raw_parameter_can_not_have_are_refused(adapt, axes):
    with pytest.raises(ValueError, match=r"parameters: .*'scale'"):
        adapt(rl.RandLoraConfig(**ALL), parameters={"scale": axes})


@FRONT_ENDS
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int4, jnp.int32, jnp.complex64])
def test_a_kernel_that_is_not_of_floating_point_numbers_is_refused_by_name(adapt, dtype):
    change = lambda a: a.astype(dtype)
    name = jnp.dtype(dtype).name
    with pytest.raises(ValueError, match=rf"'layers_\d\.(up|down)'.*'kernel' is {name}"):
        adapt(rl.RandLoraConfig(**ALL | {"exclude_modules": ["head"]}), change)
    with pytest.raises(ValueError, match=rf"'scale.*': 'scale' is {name}"):
        config = rl.RandLoraConfig(**ALL | {"exclude_modules": ["up", "down"]})
        only = lambda a: a.astype(dtype) if a.shape == (5, 5) else a
        adapt(config, only, parameters={"scale": (0,)})


@FRONT_ENDS
def test_a_layer_of_whole_numbers_can_be_left_out(adapt):
    config = rl.RandLoraConfig(**ALL | {"exclude_modules": ["head", "up"]})
    only_up = lambda a: a.astype(jnp.int8) if a.shape == (5, 7) else a
    assert set(adapt(config, only_up)["randlora"]["layers_0"]) == {"down"}


class TestConfigAndScalesAreOneThing:
    config = rl.RandLoraConfig(**ALL)

    def test_another_rank_is_refused_in_apply_merge_and_save(self, tmp_path):
        adapted, other = linen(self.config), self.config.replace(r=2)
        model = RandLora(Model(), other)
        for use in (
            lambda: model.apply(adapted, X),
            lambda: jax.jit(model.apply)(adapted, X),
            lambda: model.merge(adapted),
            lambda: rl.save_adapter(tmp_path / "a", adapted, other),
            lambda: rl.summary(adapted, other),
        ):
            with pytest.raises(ValueError, match=r"config has r=2.*made with r=3"):
                use()
        assert not list(tmp_path.iterdir())

    def test_adapting_twice_does_not_reset(self):
        adapted = linen(self.config)
        trained = {**adapted, "randlora": randomised(adapted["randlora"])}
        model = RandLora(Model(), self.config)
        with pytest.raises(ValueError, match="has an adapter already"):
            model.adapt(trained, X)
        again = model.adapt({"params": trained["params"]}, X)
        assert not np.any(again["randlora"]["head"]["randlora_lambda"])

    def test_what_does_not_fit_the_base_is_not_written(self, tmp_path):
        adapted = linen(self.config)
        scales = {**adapted["randlora"], "tail": adapted["randlora"]["head"]}
        with pytest.raises(ValueError, match="'tail' has scales in 'randlora' but no kernel"):
            rl.save_adapter(tmp_path / "a", {**adapted, "randlora": scales}, self.config)
        assert not list(tmp_path.iterdir())


def test_a_folder_does_not_tell_where_it_was_made(tmp_path):
    config = rl.RandLoraConfig(**ALL)
    adapted = linen(config)
    rl.save_adapter(tmp_path / "a", adapted, config)
    inside = [path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert inside and not any(str(tmp_path).encode() in text for text in inside)
    loaded, _ = rl.load_adapter(tmp_path / "a", {"params": adapted["params"]})
    assert_same_bits(loaded, adapted)


def test_an_adapted_model_is_still_a_linen_module():
    model = RandLora(Model(), rl.RandLoraConfig(**ALL))
    table = model.tabulate(jax.random.key(0), X, console_kwargs={"width": 200})
    assert "layers_0/up" in table and "randlora" in table
    assert {"head", "layers_1/down"} <= set(model.module_paths(jax.random.key(0), X))


def test_an_input_of_another_size_is_told_with_the_layer():
    config = rl.RandLoraConfig(**ALL)
    adapted = linen(config)
    with pytest.raises(ScopeParamShapeError, match=r'"kernel" in "/layers_0/up".*\(4, 7\)'):
        RandLora(Model(), config).apply(adapted, X[:, :4])

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return RandLora(Model(), config, name="inner")(x)

    variables = Outer().init(jax.random.key(0), X)
    with pytest.raises(ScopeParamShapeError, match=r'"kernel" in "/.*/layers_0/up"'):
        Outer().apply(variables, X[:, :4])


def test_frozen_variables_are_variables():
    config = rl.RandLoraConfig(**ALL)
    adapted = linen(config)
    mesh = jax.make_mesh((8,), ("data",))
    for frozen in (freeze(adapted), {**adapted, "params": freeze(adapted["params"])}):
        tx = rl.partition(optax.sgd(1.0), frozen, config)
        updates, _ = tx.update(frozen, tx.init(frozen), frozen)
        same = jax.tree.structure(frozen)
        assert jax.tree.structure(updates) == same
        assert jax.tree.structure(rl.labels(frozen, config)) == same
        placed = jax.device_put(frozen, rl.sharding(frozen, config, mesh))
        assert jax.tree.structure(placed) == same
        assert_same_bits(rl.combine(*rl.split(frozen, config)), adapted)
        assert_same_bits(rl.merge(frozen, config), rl.merge(adapted, config))


def test_data_axes_are_those_of_the_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    config = rl.RandLoraConfig(**ALL)
    adapted = linen(config)
    with pytest.raises(ValueError, match=r"data_axes: 'dta' is no axis of the mesh"):
        rl.sharding(adapted, config, mesh, data_axes=["dta"])
    with pytest.raises(TypeError, match=r"must be a list of names, as in \['data'\], got 'data'"):
        rl.sharding(adapted, config, mesh, data_axes="data")
