"""What "all-linear" leaves out is told: by one warning, and by the summary under "not adapted"."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora
from tests.linen_cases import normal

D, E = 5, 3
X = normal(0, 4, D)
ALL = rl.RandLoraConfig(r=2, randlora_alpha=2.0, target_modules="all-linear")
INIT = nn.initializers.normal(1.0)


class Experts(nn.Module):
    """A class that nobody has registered, with parameters of three axes."""

    @nn.compact
    def __call__(self, x):
        h = jnp.einsum("bd,edf->bef", x, self.param("wi", INIT, (E, D, 4)))
        return jnp.einsum("bef,efd->bd", h, self.param("wo", INIT, (E, 4, D)))


class Renamed(nn.Module):
    """One that is registered, with a kernel of another name in this instance, as gemma has it."""

    name_of_kernel: str = "w"

    @nn.compact
    def __call__(self, x):
        return x @ self.param(self.name_of_kernel, INIT, (D, D))


rl.register_layer(Renamed, kernel="w")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(D, name="up")(nn.LayerNorm(name="norm")(x))
        return x + Experts(name="experts")(x), None


class Everything(nn.Module):
    stacked: bool = False

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(7, D, name="table")(jnp.arange(4))
        x = x + table + self.param("position", INIT, (1, 1, D))[0]
        x = nn.MultiHeadDotProductAttention(1, name="attention")(x, x)
        x = nn.Conv(D, (3,), name="convolution")(x[None])[0]
        if self.stacked:
            lifted = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = lifted(name="blocks")(x, None)
        else:
            for i in range(2):
                x, _ = Block(name=f"blocks_{i}")(x)
        x = Renamed("weights", name="renamed")(x) @ self.param("raw", INIT, (D, D))
        return nnx.bridge.to_linen(nnx.Linear, D, D, name="bridge")(Renamed(name="known")(x))


class NnxExperts(nnx.Module):
    def __init__(self, rngs):
        self.wi, self.wo = (nnx.Param(rngs.normal(s)) for s in ((E, D, 4), (E, 4, D)))

    def __call__(self, x):
        return jnp.einsum("bef,efd->bd", jnp.einsum("bd,edf->bef", x, self.wi[...]), self.wo[...])


class NnxRenamed(nnx.Module):
    def __init__(self, name, rngs):
        self.called = name
        setattr(self, name, nnx.Param(rngs.normal((D, D))))

    def __call__(self, x):
        return x @ getattr(self, self.called)[...]


rl.register_layer(NnxRenamed, kernel="w")


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.up = nnx.LayerNorm(D, rngs=rngs), nnx.Linear(D, D, rngs=rngs)
        self.experts = NnxExperts(rngs)

    def __call__(self, x):
        x = self.up(self.norm(x))
        return x + self.experts(x)


class NnxEverything(nnx.Module):
    def __init__(self, stacked=False):
        rngs = nnx.Rngs(0)
        self.table = nnx.Embed(7, D, rngs=rngs)
        self.position, self.raw = nnx.Param(rngs.normal((1, 1, D))), nnx.Param(rngs.normal((D, D)))
        self.attention = nnx.MultiHeadAttention(1, D, rngs=rngs, decode=False)
        self.convolution = nnx.Conv(D, D, (3,), rngs=rngs)
        self.stacked = stacked
        if stacked:
            make = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: NnxBlock(rngs)))
            self.blocks = make(rngs)
        else:
            self.blocks_0, self.blocks_1 = NnxBlock(rngs), NnxBlock(rngs)
        self.renamed, self.known = NnxRenamed("weights", rngs), NnxRenamed("w", rngs)
        self.bridge = nnx.bridge.ToNNX(nn.Dense(D), rngs=rngs).lazy_init(X)

    def __call__(self, x):
        x = x + self.table(jnp.arange(4)) + self.position[0]
        x = self.convolution(self.attention(x)[None])[0]
        if self.stacked:
            x = nnx.scan(lambda x, b: b(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.blocks
            )
        else:
            x = self.blocks_1(self.blocks_0(x))
        return self.bridge(self.known(self.renamed(x) @ self.raw[...]))


def of_linen(config, stacked=False, **options):
    model = RandLora(Everything(stacked), config, **options)
    params = Everything(stacked).init(jax.random.key(0), X)["params"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        variables = model.adapt({"params": params}, X)
    return variables, caught


def of_nnx(config, stacked=False, **options):
    model = NnxEverything(stacked)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rx.inject(model, config, **options)
    return rx.variables(model), caught


def told(caught):
    return [str(one.message) for one in caught if "leaves out" in str(one.message)]


def not_adapted(variables, config):
    _, _, after = rl.summary(variables, config).partition("not adapted")
    return [line.strip() for line in after.splitlines()]


FRONT_ENDS = pytest.mark.parametrize("adapt", [of_linen, of_nnx])
LEFT_OUT = ["bridge.kernel (5, 5)", "raw (5, 5)", "renamed.weights (5, 5)"]
ONES = ["blocks_*.experts.wi (3, 5, 4), 2 of them", "blocks_*.experts.wo (3, 4, 5), 2 of them"]
STACKED = ["blocks.experts.wi (3, 5, 4)", "blocks.experts.wo (3, 4, 5)"]


@FRONT_ENDS
@pytest.mark.parametrize(("stacked", "experts"), [(False, ONES), (True, STACKED)])
def test_it_is_listed_by_the_summary_and_in_one_warning(adapt, stacked, experts):
    variables, caught = adapt(ALL, stacked)
    (message,) = told(caught)
    expected = sorted([*LEFT_OUT, *experts])
    listed = message.split("leaves out: ")[1].split(". If they")[0].split("; ")
    assert sorted(listed) == expected  # no bias, no norm, no table, no convolution
    others = ["convolution.kernel (3, 5, 5)", "table.embedding (7, 5)"]
    assert sorted(not_adapted(variables, ALL)) == sorted([*expected, *others])


@FRONT_ENDS
def test_what_is_excluded_or_trained_whole_is_left_out_on_purpose(adapt):
    excluded = ALL.replace(
        exclude_modules=["experts", "renamed", "raw"], modules_to_save=["bridge", "table"]
    )
    variables, caught = adapt(excluded)
    assert told(caught) == []
    assert not_adapted(variables, excluded) == ["convolution.kernel (3, 5, 5)"]


@FRONT_ENDS
def test_what_is_adapted_by_its_path_is_not_left_out(adapt):
    by_path = {"raw": (0,), "renamed.weights": (0,)}
    _, caught = adapt(ALL, parameters=by_path)
    (message,) = told(caught)
    assert "raw" not in message and "renamed" not in message and "experts.wi" in message


@FRONT_ENDS
def test_names_are_a_choice_and_nothing_is_told(adapt):
    config = ALL.replace(target_modules=["up"])
    variables, caught = adapt(config)
    assert told(caught) == [] and not_adapted(variables, config) == []


@FRONT_ENDS
def test_several_adapters_are_told_of_once_and_together(adapt):
    some = ALL.replace(exclude_modules=["experts", "renamed", "raw", "bridge"])
    assert len(told(adapt({"a": ALL, "b": ALL})[1])) == 1
    assert told(adapt({"a": some, "b": some.replace(target_modules=["up"])})[1]) == []


@FRONT_ENDS
def test_layers_that_are_not_to_be_transformed_are_left_out_on_purpose(adapt):
    config = ALL.replace(layers_to_transform=[1])
    variables, caught = adapt(config)
    (message,) = told(caught)
    assert "blocks_1.experts.wi (3, 5, 4)" in message and "blocks_0" not in message
    assert "raw" not in message  # it is in no layer
    assert all("blocks_0" not in line for line in not_adapted(variables, config))


@FRONT_ENDS
def test_a_registered_layer_that_is_named_and_has_another_kernel_is_refused(adapt):
    message = r"'renamed' has no parameter 'w', the kernel of its class, but \['weights'\]: adapt"
    with pytest.raises(ValueError, match=message):
        adapt(ALL.replace(target_modules=["renamed", "up"]))


@FRONT_ENDS
def test_a_target_that_is_no_known_layer_is_told_what_would_make_it_one(adapt):
    with pytest.raises(ValueError, match=r"'blocks_0.experts', which is a \w*Experts.*call rand"):
        adapt(ALL.replace(target_modules=["experts"]))
    with pytest.raises(ValueError, match=r"Block and not .*: name some of 'blocks_0.up', or"):
        adapt(ALL.replace(target_modules=["blocks_0"]))
    with pytest.raises(
        ValueError, match=r"'raw' is no module but the parameter.*'raw': \(\.\.\.\)"
    ):
        adapt(ALL.replace(target_modules=["raw"]))


@FRONT_ENDS
def test_the_warning_points_to_the_line_of_the_user(adapt):
    _, caught = adapt(ALL)
    (one,) = (one for one in caught if "leaves out" in str(one.message))
    assert one.filename == __file__


@FRONT_ENDS
@pytest.mark.parametrize("name", ["known.w", "up.kernel", "up.bias", r".*\.up\.kernel"])
def test_what_is_adapted_is_excluded_by_its_module_s_name_alone(adapt, name):
    names = name if "*" in name else [name]
    with pytest.raises(ValueError, match=r"exclude_modules: .* matches no module"):
        adapt(ALL.replace(exclude_modules=names))
    with pytest.raises(ValueError, match="exclude_modules: 'raw' matches no module"):
        adapt(ALL.replace(exclude_modules=["raw"]), parameters={"raw": (0,)})


@FRONT_ENDS
def test_a_kernel_s_own_name_is_no_target(adapt):
    with pytest.raises(ValueError, match=r"'up.kernel' is the kernel of 'blocks_\d.up': give that"):
        adapt(ALL.replace(target_modules=["up.kernel"]))
    with pytest.raises(ValueError, match="target_modules: 'bias' matches no module"):
        adapt(ALL.replace(target_modules=["bias", "up"]))
