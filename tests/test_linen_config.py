"""What each field of the config does to a Linen model."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import randlora_jax as rl
from randlora_jax import RandLoraConfig, trees
from randlora_jax.bases import nbytes
from randlora_jax.linen import RandLora
from tests.linen_cases import (
    Case,
    R,
    as_numpy,
    assert_close,
    assert_same_bits,
    normal,
    randomised,
    update,
)
from tests.linen_models import PLAIN, Block, Scan, block_kernels

X = normal(0, 4, 5)


class Numbered(nn.Module):
    """Blocks with numbers in their names, and a head."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = Block(name=f"layers_{i}")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x))


BASE = Numbered()


@functools.cache
def base_params():
    return BASE.init(jax.random.key(0), X)["params"]


def adapted(**fields):
    """The adapted model and its variables before training."""
    settings = {"r": R, "randlora_alpha": 2.0, "target_modules": "all-linear", **fields}
    model = RandLora(BASE, RandLoraConfig(**settings))
    return model, model.adapt({"params": base_params()}, X)


def train(variables):
    return {**variables, "randlora": randomised(variables["randlora"])}


def targets(**fields):
    """The dotted paths of what is adapted."""
    _, variables = adapted(**fields)
    return sorted({".".join(path[:-1]) for path, _ in trees.items(variables["randlora"])})


UPS = [f"layers_{i}.up" for i in range(3)]
DOWNS = [f"layers_{i}.down" for i in range(3)]

# What is adapted


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": "all-linear"}, [*UPS, *DOWNS, "head"]),
        ({"target_modules": ["up"]}, UPS),
        ({"target_modules": ["layers_1.up", "head"]}, ["layers_1.up", "head"]),
        ({"target_modules": r".*_[02]\.(up|down)"}, [*UPS[::2], *DOWNS[::2]]),
        ({"exclude_modules": ["down", "head"]}, UPS),
        ({"exclude_modules": r"layers_.*"}, ["head"]),
        ({"modules_to_save": ["head"]}, [*UPS, *DOWNS]),
        ({"layers_to_transform": [0, 2]}, [*UPS[::2], *DOWNS[::2]]),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, ["layers_1.up", "layers_1.down"]),
        ({"target_modules": ["up"], "layers_to_transform": [2]}, ["layers_2.up"]),
    ],
    ids=str,
)
def test_targets_are(fields, expected):
    assert targets(**fields) == sorted(expected)


def test_what_is_not_a_target_computes_as_the_base():
    model, variables = adapted(target_modules=["layers_1.up"])
    merged = model.merge(train(variables))
    changed = [
        p for p, leaf in trees.items(merged) if leaf is not dict(trees.items(base_params()))[p]
    ]
    assert changed == [("layers_1", "up", "kernel")]


@pytest.mark.parametrize(("target", "nearest"), [("layers_1.upp", "layers_1.up"), ("haed", "head")])
def test_a_target_that_matches_nothing_raises_and_names_the_nearest(target, nearest):
    with pytest.raises(ValueError, match=f"'{target}' matches no module.*nearest are '{nearest}'"):
        targets(target_modules=["down", target])


def test_a_target_that_is_not_linear_raises_and_names_its_type():
    with pytest.raises(ValueError, match="'norm', which is a LayerNorm and not a known linear"):
        targets(target_modules=["up", "norm"])


def test_layers_that_do_not_exist_raise():
    with pytest.raises(ValueError, match=r"layers_to_transform=\(7,\).*leaves no"):
        targets(layers_to_transform=[7])


# Stacked layers

STACK_KERNELS = block_kernels("layers/inner/", (0,))


@functools.cache
def stack_case(**fields):
    return Case(Scan(length=4), (X,), STACK_KERNELS, config=fields)


@pytest.mark.parametrize("pattern", [None, "layers"])
def test_layers_of_a_stack_that_are_not_chosen_get_exactly_no_update(pattern):
    case = stack_case(layers_to_transform=(3, 1), layers_pattern=pattern)
    params, merged = case.base_variables["params"], case.model.merge(case.trained)
    for name in ("up", "down"):
        old, new = (p["layers"]["inner"][name]["kernel"] for p in (params, merged))
        assert [bool((old[i] == new[i]).all()) for i in range(4)] == [True, False, True, False]
    y = case.model.apply(case.trained, X)
    assert_close(as_numpy(y), as_numpy(case.base.apply({"params": merged}, X)), 2e-5)


def test_layers_of_a_stack_that_are_not_chosen_count_as_no_parameters():
    chosen, whole = stack_case(layers_to_transform=(1, 3)), stack_case()
    count = lambda case: sum(x.size for x in jax.tree.leaves(case.variables["randlora"]))
    assert count(chosen) == count(whole) // 2
    assert "layers.inner.up" in rl.summary(chosen.variables, chosen.model.config)


def test_a_row_of_a_stack_is_the_layer_it_was_chosen_for():
    case = stack_case(layers_to_transform=(1, 3))
    old, new = (
        p["layers"]["inner"]["up"]["kernel"]
        for p in (case.trained["params"], case.model.merge(case.trained))
    )
    scales = case.trained["randlora"]["layers"]["inner"]["up"]
    bases = case.trained["randlora_bases"]
    A, B, lam, gamma = as_numpy(
        [
            bases["randlora_A"],
            bases["randlora_B"],
            *(scales[f"randlora_{s}"] for s in ("lambda", "gamma")),
        ]
    )
    for row, layer in enumerate((1, 3)):
        delta = update(A, B, lam[row], gamma[row], 5, 7, 2.0 / R)
        assert_close(as_numpy(new[layer]) - as_numpy(old[layer]), delta, 1e-5)


def test_a_stack_with_too_few_layers_raises_and_says_how_many_it_has():
    with pytest.raises(ValueError, match=r"layers_to_transform=\(4,\).*\(4,\) layers"):
        stack_case(layers_to_transform=(4,)).model.init(jax.random.key(0), X)


def test_a_stack_on_another_axis_is_refused_by_name_if_layers_are_to_be_counted():
    case = Case(Scan(length=4, axis=1), (X,), block_kernels("layers/inner/", (1,)),
                config={"layers_to_transform": (1,)})  # fmt: skip
    with pytest.raises(ValueError, match=r"'layers\.inner\.\w+' is stacked along another"):
        case.model.init(jax.random.key(0), X)


# What trains, and what it starts from


@pytest.mark.parametrize(
    ("bias", "biases"),
    [("none", set()), ("randlora_only", {"layers_0.up"}), ("all", {*UPS, *DOWNS, "head", "norm"})],
)
def test_bias_trains(bias, biases):
    model, variables = adapted(bias=bias, target_modules=["layers_0.up"])
    trainable, _ = rl.split(variables, model.config)
    paths = {path for path, _ in trees.items(trainable.get("params", {}))}
    assert {".".join(path[:-1]) for path in paths} == biases
    assert {path[-1] for path in paths} <= {"bias"}


def test_biases_and_saved_modules_go_through_split_merge_save_and_load(tmp_path):
    model, variables = adapted(bias="randlora_only", modules_to_save=["head"])
    trainable, frozen = rl.split(variables, model.config)
    assert set(trainable["params"]["head"]) == {"kernel", "bias"}
    assert set(trainable["params"]["layers_1"]["up"]) == {"bias"}
    trained = rl.combine(randomised(trainable), frozen)
    y = BASE.apply({"params": model.merge(trained)}, X)
    assert_close(as_numpy(model.apply(trained, X)), as_numpy(y), 2e-5)
    rl.save_adapter(tmp_path / "adapter", trained, model.config)
    loaded, config = rl.load_adapter(tmp_path / "adapter", {"params": base_params()})
    assert config == model.config
    assert_same_bits(loaded, trained)


def test_init_weights_false_starts_from_normal_lambda_and_one_over_the_larger_side():
    _, variables = adapted(init_weights=False)
    scales = variables["randlora"]["layers_0"]["up"]
    lam = np.concatenate(
        [np.ravel(v) for p, v in trees.items(variables["randlora"]) if "lambda" in p[-1]]
    )
    assert abs(lam.mean()) < 0.5 and 0.6 < lam.std() < 1.4 and len(np.unique(lam)) == lam.size
    assert set(np.unique(scales["randlora_gamma"])) == {np.float32(1 / 7)}


def test_init_weights_true_starts_from_zero_lambda_and_one_over_the_largest_side_of_gamma():
    _, variables = adapted()
    scales = variables["randlora"]["layers_0"]["up"]
    assert not scales["randlora_lambda"].any()
    assert set(np.unique(scales["randlora_gamma"])) == {np.float32(1 / 5)}


# Ternary bases


@pytest.mark.parametrize("field", ["sparse", "very_sparse"])
def test_ternary_bases_give_the_output_of_their_dense_values(field):
    case = Case(nn.Dense(7), (X,), PLAIN, config={field: True})
    bases = case.trained["randlora_bases"]
    assert {k: str(v.dtype) for k, v in bases.items()} == {
        "randlora_A": "int8", "randlora_B": "int8", "randlora_scale": "float32",
    }  # fmt: skip
    scale = bases["randlora_scale"]
    dense = {
        name: scale[i] * bases[name].astype(jnp.float32)
        for i, name in enumerate(("randlora_A", "randlora_B"))
    }
    plain = Case(nn.Dense(7), (X,), PLAIN)
    expected = plain.model.apply({**case.trained, "randlora_bases": dense}, X)
    for strategy in ("merged", "factored"):
        y = case.model.clone(strategy=strategy).apply(case.trained, X)
        assert_close(as_numpy(y), as_numpy(expected), 1e-5)
    merged = case.base.apply({"params": case.model.merge(case.trained)}, X)
    assert_close(as_numpy(merged), as_numpy(expected), 1e-5)


def test_ternary_bases_take_a_quarter_of_the_memory_of_dense_ones():
    bases = lambda **fields: adapted(**fields)[1]["randlora_bases"]
    assert nbytes(bases(sparse=True)) == nbytes(bases()) // 4 + 8
