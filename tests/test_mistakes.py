"""What goes wrong is told before any work, by the field and the name, in both front ends."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import inject, load_adapter, variables
from tests.linen_cases import normal, randomised

X = normal(0, 2, 5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(5, name="down")(nn.tanh(nn.Dense(7, name="up")(x)))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.normal(), (5, 5))
        for i in range(2):
            x = Block(name=f"layers_{i}")(x)
        return nn.Dense(3, name="head")(x @ scale)


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 5, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.scale = nnx.Param(rngs.normal((5, 5)))
        self.layers_0, self.layers_1 = NnxBlock(rngs), NnxBlock(rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.layers_1(self.layers_0(x)) @ self.scale[...])


def linen(config, change=lambda a: a, **options):
    """The variables of a Linen model, adapted; `change` is applied to its kernels."""
    params = Model().init(jax.random.key(0), X)["params"]
    change_kernels = lambda path, a: change(a) if path[-1].key in ("kernel", "scale") else a
    params = jax.tree.map_with_path(change_kernels, params)
    return RandLora(Model(), config, **options).adapt({"params": params}, X)


def in_place(config, change=lambda a: a, **options):
    """The same of an NNX model, which is as it was if it fails."""
    model = NnxModel()
    for path, variable in nnx.iter_graph(model):
        if path and path[-1] in ("kernel", "scale") and isinstance(variable, nnx.Variable):
            variable.set_value(change(variable.get_value()))
    before = nnx.graphdef(model), {p: v for p, v in nnx.iter_graph(model)}
    try:
        return variables(inject(model, config, **options))
    except Exception:
        after = nnx.graphdef(model), {p: v for p, v in nnx.iter_graph(model)}
        assert before[0] == after[0] and list(before[1]) == list(after[1])
        raise


FRONT_ENDS = pytest.mark.parametrize("adapt", [linen, in_place])
ALL = {"r": 3, "target_modules": "all-linear"}


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
    assert set(adapt(config)["randlora"]) == {"layers_0"}


class Idle(nn.Module):
    """Holds layers that it does not run: one by a nested apply, as tied heads are, others not."""

    def setup(self):
        self.up, self.head = nn.Dense(7), nn.Dense(5, use_bias=False)
        self.spare = [nn.Dense(2), nn.Dense(3)]

    def __call__(self, x):
        h, kernel = self.up(x), self.up.variables["params"]["kernel"].T
        return self.head.apply({"params": {"kernel": kernel}}, h)


@pytest.mark.parametrize("names", [["head"], ["spare_1", "head"], r"head|spare_\d"])
def test_layers_that_do_not_run_can_be_excluded_and_nothing_else(names):
    base = {"params": {"up": Idle().init(jax.random.key(0), X)["params"]["up"]}}
    config = rl.RandLoraConfig(**ALL)
    adapted = RandLora(Idle(), config.replace(exclude_modules=names)).adapt(base, X)
    assert set(adapted["randlora"]) == {"up"}
    if isinstance(names, list):
        with pytest.raises(ValueError, match=r"modules_to_save: .* matches no module"):
            RandLora(Idle(), config.replace(modules_to_save=names)).adapt(base, X)


@FRONT_ENDS
def test_the_heads_that_peft_names_by_itself_need_not_be_there(adapt):
    names = {"modules_to_save": ["head", "classifier", "score"], "task_type": "SEQ_CLS"}
    assert adapt(rl.RandLoraConfig(**ALL | names))


@FRONT_ENDS
def test_a_raw_parameter_that_is_not_there_is_told_with_the_nearest(adapt):
    with pytest.raises(ValueError, match=r"parameters: 'scales' matches no parameter.*'scale'"):
        adapt(rl.RandLoraConfig(**ALL), parameters={"scales": (0,)})


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


def test_a_layer_of_whole_numbers_can_be_left_out():
    config = rl.RandLoraConfig(**ALL | {"exclude_modules": ["head", "up"]})
    only_up = lambda a: a.astype(jnp.int8) if a.shape == (5, 7) else a
    assert set(in_place(config, only_up)["randlora"]["layers_0"]) == {"down"}


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
            with pytest.raises(ValueError, match=r"r=[23]"):
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
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded, adapted))


def test_an_adapted_model_is_still_a_linen_module():
    model = RandLora(Model(), rl.RandLoraConfig(**ALL))
    table = model.tabulate(jax.random.key(0), X, console_kwargs={"width": 200})
    assert "layers_0/up" in table and "randlora" in table
    assert {"head", "layers_1/down"} <= set(model.module_paths(jax.random.key(0), X))


def test_data_axes_are_those_of_the_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    config = rl.RandLoraConfig(**ALL)
    adapted = linen(config)
    with pytest.raises(ValueError, match=r"data_axes: 'dta' is no axis of the mesh"):
        rl.sharding(adapted, config, mesh, data_axes=["dta"])
    with pytest.raises(TypeError, match="must be a list of names, got 'data'"):
        rl.sharding(adapted, config, mesh, data_axes="data")


ADAPTED = ("split", "labels", "merge", "sharding", "summary", "save_adapter", "peft.save_adapter")
ON_A_BASE = ("load_adapter", "peft.load_adapter")


@pytest.fixture(scope="module")
def adapted():
    return linen(TestMixUps.config)


class TestMixUps:
    config = rl.RandLoraConfig(**ALL)

    def call(self, name, variables, config, tmp_path):
        function = rl
        for part in name.split("."):
            function = getattr(function, part)
        if "load_adapter" in name:
            return function(tmp_path / "adapter", variables)
        if "save_adapter" in name:
            return function(tmp_path / "adapter", variables, config)
        return function(variables, config)

    @pytest.mark.parametrize("name", ADAPTED)
    @pytest.mark.parametrize(
        ("mix_up", "message"),
        [
            (lambda v, c: ({"params": v["params"]}, c), "no adapter: RandLora"),
            (lambda v, c: (v["params"], c), r"give \{'params': ...\}"),
            (lambda v, c: (rl.split(v, c)[0], c), r"rl\.combine\(trainable, frozen\)"),
            (lambda v, c: (NnxModel(), c), r"randlora_jax\.nnx\.variables\(model\)"),
            (lambda v, c: (Model(), c), "a Linen module: give the variables"),
            (lambda v, c: ((v, c), c), "write `variables, config = ...` first"),
            (lambda v, c: (c, v), "come first, then the config"),
            (lambda v, c: ({**v, "randlora": {"a": v["randlora"]}}, {"a": c}), "adapters.select"),
            (lambda v, c: (v, v), "variables: they come first"),
            (lambda v, c: (v, "all-linear"), "must be a RandLoraConfig, got str: 'all-linear'"),
            (lambda v, c: (None, c), "must be a dictionary of collections, got NoneType"),
        ],
    )
    def test_of_adapted_variables(self, name, mix_up, message, adapted, tmp_path):
        if name == "merge" and "adapters.select" in message:
            return  # it takes several
        with pytest.raises((TypeError, ValueError), match=message):
            self.call(name, *mix_up(adapted, self.config), tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("name", ON_A_BASE)
    @pytest.mark.parametrize(
        ("mix_up", "message"),
        [
            (lambda v, c: v["params"], r"give \{'params': ...\}"),
            (lambda v, c: rl.split(v, c)[0], "combine"),
            (lambda v, c: NnxModel(), r"randlora_jax\.nnx\.variables\(model\)"),
            (lambda v, c: (v, c), "write `variables, config = ...` first"),
            (lambda v, c: c, "the variables come first"),
        ],
    )
    def test_of_a_base(self, name, mix_up, message, adapted, tmp_path):
        with pytest.raises((TypeError, ValueError), match=message):
            self.call(name, mix_up(adapted, self.config), None, tmp_path)

    @pytest.mark.parametrize(
        ("use", "message"),
        [
            (lambda m, v, c: m.apply(v["params"], X), r"give \{'params': ...\}"),
            (lambda m, v, c: m.apply({"params": v["params"]}, X), "no adapter: RandLora"),
            (lambda m, v, c: m.apply((v, c), X), "write `variables, config = ...` first"),
            (lambda m, v, c: m.apply(rl.split(v, c)[0], X), "combine"),
            (lambda m, v, c: m.merge(v["params"]), r"give \{'params': ...\}"),
            (lambda m, v, c: m.adapt(v["params"], X), r"give \{'params': ...\}"),
            (lambda m, v, c: m.adapt(X, v), "must be a dictionary of collections"),
            (lambda m, v, c: RandLora(c, Model()), "it comes first, then the config"),
            (lambda m, v, c: RandLora(NnxModel(), c), "inject adapts an NNX model"),
            (lambda m, v, c: RandLora(Model(), v), "config must be a RandLoraConfig"),
            (lambda m, v, c: inject(c, NnxModel()), "it comes first, then the config"),
            (lambda m, v, c: inject(Model(), c), "RandLora wraps a Linen module"),
            (lambda m, v, c: inject(NnxModel(), "all-linear"), "config must be a RandLoraConfig"),
            (lambda m, v, c: load_adapter(NnxModel(), "path"), "path first"),
        ],
    )
    def test_of_the_front_ends(self, use, message, adapted):
        with pytest.raises((TypeError, ValueError), match=message):
            use(RandLora(Model(), self.config), adapted, self.config)

    def test_a_folder_of_the_other_library(self, adapted, tmp_path):
        base = {"params": adapted["params"]}
        rl.save_adapter(tmp_path / "ours", adapted, self.config)
        rl.peft.save_adapter(tmp_path / "theirs", adapted, self.config)
        with pytest.raises(FileNotFoundError, match=r"PEFT's, which rl\.peft\.load_adapter reads"):
            rl.load_adapter(tmp_path / "theirs", base)
        with pytest.raises(FileNotFoundError, match=r"library's, which rl\.load_adapter reads"):
            rl.peft.load_adapter(tmp_path / "ours", base)
