"""The usual mix-ups of arguments are told, with the line to write instead, before any work."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import randlora_jax as rl
from randlora_jax.linen import RandLora
from randlora_jax.nnx import inject, load_adapter
from randlora_jax.registry import rule_for
from tests.refused_models import ALL, Model, NnxModel, X, linen

CONFIG = rl.RandLoraConfig(**ALL)
ADAPTED = ("split", "labels", "merge", "sharding", "summary", "save_adapter", "peft.save_adapter")
ON_A_BASE = ("load_adapter", "peft.load_adapter")


@pytest.fixture(scope="module")
def adapted():
    return linen(CONFIG)


def call(name, variables, config, tmp_path):
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
        (lambda v, c: (v, v), "variables: they come first"),
        (lambda v, c: (v, "all-linear"), "must be a RandLoraConfig, got str: 'all-linear'"),
        (lambda v, c: (None, c), "must be a dictionary of collections, got NoneType"),
    ],
)
def test_mix_ups_of_adapted_variables(name, mix_up, message, adapted, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        call(name, *mix_up(adapted, CONFIG), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["summary", "save_adapter", "peft.save_adapter"])
def test_several_adapters_where_one_is_wanted(name, adapted, tmp_path):
    several = {**adapted, "randlora": {"a": adapted["randlora"]}}
    with pytest.raises(TypeError, match=r"adapters\.select"):
        call(name, several, {"a": CONFIG}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "use",
    [
        lambda v, c: rl.split(v, c),
        lambda v, c: rl.labels(v, c),
        lambda v, c: rl.merge(v, c),
        lambda v, c: rl.adapters.select(v, c, "a"),
        lambda v, c: rl.adapters.with_strength(v, c, 2.0),
        lambda v, c: rl.adapters.delete(v, {**c, "b": CONFIG}, "b"),
        lambda v, c: RandLora(Model(), c).apply(v, X),
        lambda v, c: RandLora(Model(), c).merge(v),
    ],
)
def test_a_config_by_name_for_an_adapter_without_one(use, adapted):
    with pytest.raises(ValueError, match=r"names an adapter 'a'.*holds \['head', .*config alone"):
        use(adapted, {"a": CONFIG})


VERBS = {
    "select": lambda v, c: rl.adapters.select(v, c, "a"),
    "delete": lambda v, c: rl.adapters.delete(v, c, "a"),
    "with_strength": lambda v, c: rl.adapters.with_strength(v, c, 0.5),
    "insert": lambda v, c: rl.adapters.insert(v, c, "b", v, CONFIG),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_mix_ups_of_the_verbs_of_adapters(verb, adapted):
    with pytest.raises(ValueError, match="no adapter: RandLora"):
        verb({"params": adapted["params"]}, {"a": CONFIG})
    with pytest.raises(TypeError, match="a RandLoraConfig: the variables come first"):
        verb(CONFIG, adapted)
    with pytest.raises(TypeError, match=r"nnx\.variables\(model\)"):
        verb(NnxModel(), {"a": CONFIG})
    with pytest.raises(TypeError, match="config must be a RandLoraConfig, got str"):
        verb(adapted, "all-linear")


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
def test_mix_ups_of_a_base(name, mix_up, message, adapted, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        call(name, mix_up(adapted, CONFIG), None, tmp_path)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, v, c: m.apply(v["params"], X), r"give \{'params': ...\}"),
        (lambda m, v, c: m.apply({"params": v["params"]}, X), "no adapter: RandLora"),
        (lambda m, v, c: m.apply((v, c), X), "write `variables, config = ...` first"),
        (lambda m, v, c: m.apply(rl.split(v, c)[0], X), "combine"),
        (lambda m, v, c: m.merge(v["params"]), r"give \{'params': ...\}"),
        (lambda m, v, c: m.adapt(v["params"], X), r"give \{'params': ...\}"),
        (lambda m, v, c: m.adapt(X, v), "got an array; the variables come first, then the inputs"),
        (lambda m, v, c: m.adapt(jax.random.key(0), X), r"a random key: init\(key, x\) makes"),
        (lambda m, v, c: m.adapt(jax.random.PRNGKey(0), X), r"a random key: init\(key, x\) makes"),
        (lambda m, v, c: RandLora(c, Model()), "it comes first, then the config"),
        (lambda m, v, c: RandLora(NnxModel(), c), "inject adapts an NNX model"),
        (lambda m, v, c: RandLora(Model(), v), "config must be a RandLoraConfig"),
        (lambda m, v, c: inject(c, NnxModel()), "it comes first, then the config"),
        (lambda m, v, c: inject(Model(), c), "RandLora wraps a Linen module"),
        (lambda m, v, c: inject(NnxModel(), "all-linear"), "config must be a RandLoraConfig"),
        (lambda m, v, c: load_adapter(NnxModel(), "path"), "path first"),
    ],
)
def test_mix_ups_of_the_front_ends(use, message, adapted):
    with pytest.raises((TypeError, ValueError), match=message):
        use(RandLora(Model(), CONFIG), adapted, CONFIG)


AXES = r"input_axes must be axes of the kernel, counted from 0.*as in \(0,\), got "


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"kernel": (0,)}, TypeError, r"kernel must be the parameter's name.*got \(0,\)"),
        ({"kernel": None}, TypeError, "kernel must be the parameter's name.*got None"),
        ({"input_axes": (-1,)}, ValueError, AXES + r"\(-1,\)"),
        ({"input_axes": -2}, ValueError, AXES + "-2"),
        ({"input_axes": (0, 0)}, ValueError, AXES + r"\(0, 0\)"),
        ({"input_axes": ()}, ValueError, AXES + r"\(\)"),
        ({"input_axes": "0"}, ValueError, AXES + "'0'"),
        ({"input_axes": (0.0,)}, ValueError, AXES + r"\(0\.0,\)"),
        ({"input_axes": True}, ValueError, AXES + "True"),
    ],
)
def test_mix_ups_of_register_layer(values, error, message):
    class Layer(nn.Module):
        pass

    with pytest.raises(error, match=message):
        rl.register_layer(Layer, **values)
    assert rule_for(Layer) is None


@pytest.mark.parametrize("axes", [1, [1], (1,), np.int64(1), np.array([1])])
def test_input_axes_can_be_one_or_any_sequence(axes):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.normal(), (7, 5)).T

    rl.register_layer(Layer, kernel="w", input_axes=axes)
    variables = RandLora(Layer(), CONFIG).init(jax.random.key(0), X)
    assert set(variables["randlora"]) == {"w[1]"}


def test_a_folder_of_the_other_library(adapted, tmp_path):
    base = {"params": adapted["params"]}
    rl.save_adapter(tmp_path / "ours", adapted, CONFIG)
    rl.peft.save_adapter(tmp_path / "theirs", adapted, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"PEFT's, which rl\.peft\.load_adapter reads"):
        rl.load_adapter(tmp_path / "theirs", base)
    with pytest.raises(FileNotFoundError, match=r"library's, which rl\.load_adapter reads"):
        rl.peft.load_adapter(tmp_path / "ours", base)
