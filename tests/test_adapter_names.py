"""What adapters can be called, and what happens with names that are taken or unknown."""

import pytest

import randlora_jax as rl
from randlora_jax import adapters, nnx
from randlora_jax.linen import RandLora
from tests.linen_cases import assert_same_bits
from tests.nnx_models import unchanged_if_it_fails
from tests.refused_models import NnxModel
from tests.test_adapters import BASE, CONFIGS, MODEL, X, all_variables, alone, base_params, train

NAMES = ["a.b", "a/b", "a:b", "a:"]


def renamed(by_name):
    """Two adapters by plain names."""
    return dict(zip("ab", by_name.values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_can_hold_any_letters(name, tmp_path):
    configs = {name: CONFIGS["chat"], "z": CONFIGS["code"]}
    model, plain = RandLora(BASE, configs), RandLora(BASE, renamed(configs))
    variables = train(model.adapt({"params": base_params()}, X))
    same = {**variables, "randlora": renamed(variables["randlora"])}
    assert_same_bits(model.apply(variables, X), plain.apply(same, X))
    assert_same_bits(model.merge(variables), plain.merge(same))
    one, config = adapters.select(variables, configs, name)
    rl.save_adapter(tmp_path / "a", one, config)
    assert_same_bits(rl.load_adapter(tmp_path / "a", {"params": base_params()})[0], one)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_can_hold_any_letters_in_nnx(name):
    configs = {name: CONFIGS["math"], "z": CONFIGS["code"]}
    model, plain = nnx.inject(NnxModel(), configs), nnx.inject(NnxModel(), renamed(configs))
    values = train(nnx.variables(model))
    nnx.update(model, values)
    nnx.update(plain, {**values, "randlora": renamed(values["randlora"])})
    assert_same_bits(nnx.variables(model)["randlora"], values["randlora"])
    assert_same_bits(model(X), plain(X))
    assert_same_bits(nnx.merge(model)(X), nnx.merge(plain)(X))


@pytest.mark.parametrize("others", [(), ("b",)])
@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("", ValueError, "config names an adapter ''.*'default'"),
        (3, TypeError, "by strings.*'chat'.*got 3"),
        (None, TypeError, "by strings.*got None"),
    ],
)
def test_what_can_not_be_a_name_is_refused_before_any_work(name, error, match, others):
    configs = {other: CONFIGS["chat"] for other in (*others, name)}
    with pytest.raises(error, match=match):
        RandLora(BASE, configs)
    with unchanged_if_it_fails(model := NnxModel()), pytest.raises(error, match=match):
        nnx.inject(model, configs)
    first, config = alone("code")
    held = {**first, "randlora": {"code": first["randlora"]}}
    with pytest.raises(error, match=match):
        adapters.insert(held, {"code": config}, name, first, config)


def test_names_that_are_taken_or_unknown_raise():
    first, config = alone("code")
    with pytest.raises(ValueError, match="there is an adapter 'code' already"):
        adapters.insert(all_variables(), CONFIGS, "code", first, config)
    with pytest.raises(ValueError, match=r"names \['cod'\], the adapters are .*'code'"):
        MODEL.clone(active=("cod",))
    with pytest.raises(ValueError, match="there is no adapter 'cod'"):
        adapters.select(all_variables(), CONFIGS, "cod")
    with pytest.raises(TypeError, match="adapters are named in a tuple"):
        MODEL.clone(active="code")
    with pytest.raises(ValueError, match="empty mapping"):
        RandLora(BASE, {})
