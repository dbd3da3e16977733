"""Uses of the public surface that both checkers accept, with the types that they give."""

import pathlib
from collections.abc import Mapping
from typing import Any, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rl_nnx
from randlora_jax.linen import RandLora


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inside = nnx.Linear(8, 8, rngs=rngs)


class Einsum(nn.Module):
    shape: tuple[int, ...]


def config(targets: list[str]) -> None:
    rl.RandLoraConfig(target_modules=["q_proj"], exclude_modules=["layers_0"])
    rl.RandLoraConfig(target_modules=("q_proj",), layers_to_transform=[0, 1])
    rl.RandLoraConfig(target_modules={"q_proj", "v_proj"}, layers_to_transform=0)
    rl.RandLoraConfig(target_modules=frozenset(targets), modules_to_save=targets)
    rl.RandLoraConfig(target_modules="all-linear", layers_to_transform=range(4))
    rl.RandLoraConfig(target_modules=None, layers_pattern=["layers"], layers_to_transform=(1,))
    one = rl.RandLoraConfig(r=4, randlora_alpha=8, bias="randlora_only", task_type="CAUSAL_LM")
    assert_type(one.r, int)
    assert_type(one.scaling, float)
    assert_type(one.replace(r=8, bias="all"), rl.RandLoraConfig)
    assert_type(rl.RandLoraConfig.from_dict(one.to_dict()), rl.RandLoraConfig)
    assert_type(rl.RandLoraConfig.from_json(one.to_json()), rl.RandLoraConfig)


def linen(base: nn.Module, config: rl.RandLoraConfig, x: jax.Array) -> jax.Array:
    RandLora(base, {"chat": config, "code": config}, active=("chat",))
    RandLora(base, config, None, {"mlp.w": (1,)}, strategy="merged", bases_dtype=jnp.bfloat16)
    model = RandLora(base, config, deterministic=True, name="adapted")
    assert_type(model.base, nn.Module)
    variables = model.adapt({"params": {}}, x, train=False, rngs={"dropout": jax.random.key(0)})
    model.adapt(model.init(jax.random.key(0), x), jax.ShapeDtypeStruct((1, 8), jnp.float32))
    model.merge(model.init(jax.random.key(0), x), x, safe=False)
    assert_type(variables, dict[str, Any])
    assert_type(model.merge(variables), dict[str, Any])
    y, changed = model.apply(variables, x, mutable=["batch_stats"], rngs=jax.random.key(0))
    model.apply({**variables, **changed}, y, method="encode", deterministic=False)
    return model.apply(variables, x)


def in_place(config: rl.RandLoraConfig, path: pathlib.Path) -> None:
    model = rl_nnx.inject(Model(nnx.Rngs(0)), config)
    assert_type(model, Model)
    assert_type(model.inside, nnx.Linear)
    rl_nnx.inject(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {"chat": config}, strategy="factored")
    rl_nnx.set_active(model, ("chat",))
    rl_nnx.update(model, rl_nnx.variables(model))
    rl_nnx.insert(model, "code", config, values=rl_nnx.variables(model), rngs=nnx.Rngs(0))
    rl_nnx.set_strength(model, {"chat": 0.5, "code": jnp.ones(())})
    rl_nnx.set_strength(model, 2)
    rl_nnx.delete(model, "code")
    nnx.Optimizer(model, optimizer(), wrt=rl_nnx.trainable(model, ("chat",)))
    assert_type(rl_nnx.variables(model), dict[str, Any])
    nnx.Optimizer(model, optimizer(), wrt=rl_nnx.trainable(model))
    with rl_nnx.lend_bases(model):
        model.inside(jnp.ones((1, 8)))
    rl_nnx.load_adapter(path, model, strategy="auto", rngs=nnx.Rngs(0), bases_dtype="bfloat16")
    assert_type(rl_nnx.merge(model, safe=False), Model)
    assert_type(rl_nnx.remove(model), Model)


def optimizer() -> Any: ...


def files(
    variables: Mapping[str, Any], config: rl.RandLoraConfig, path: pathlib.Path
) -> tuple[dict[str, Any], rl.RandLoraConfig]:
    rl.save_adapter(str(path), variables, config, overwrite=True)
    rl.save_adapter(path, variables, config)
    rl.AdapterSave(variables, config)
    rl.AdapterRestore({"params": variables["params"]})
    rl.AdapterRestore({"params": variables["params"]}, config)
    rl.load_adapter(path, {"params": variables["params"]}, config)
    rl.peft.load_adapter(path, variables, adapter_name="chat")
    rl.peft.load_adapter(str(path), variables, {"model.q": "q", "model.k": ("attention", "k")})
    rl.peft.load_adapter(path, variables, lambda name: (("layers", "q"), 3))
    name_map = rl.peft.NameMap((("transformer.h.{}", "blocks"), ("transformer", "")))
    rl.peft.save_adapter(path, variables, config, name_map, overwrite=True)
    assert_type(rl.peft.module_names(path), list[str])
    loaded = rl.load_adapter(path, {"params": variables["params"]})
    assert_type(loaded, tuple[dict[str, Any], rl.RandLoraConfig])
    return loaded


def several(variables: Mapping[str, Any], config: rl.RandLoraConfig) -> None:
    configs = {"chat": config}
    assert_type(
        rl.adapters.select(variables, configs, "chat"), tuple[dict[str, Any], rl.RandLoraConfig]
    )
    assert_type(
        rl.adapters.insert(variables, configs, "code", variables, config),
        tuple[dict[str, Any], dict[str, rl.RandLoraConfig]],
    )

    assert_type(
        rl.adapters.delete(variables, configs, "chat"),
        tuple[dict[str, Any], dict[str, rl.RandLoraConfig]],
    )
    assert_type(
        rl.adapters.with_strength(variables, configs, {"chat": jnp.ones(())}), dict[str, Any]
    )
    assert_type(rl.adapters.with_strength(variables, config, 0.5), dict[str, Any])
    rl.split(variables, configs, ("chat",))
    rl.labels(variables, configs, ("chat",))
    rl.partition(optimizer(), variables, configs, ("chat",))


def reports(variables: Mapping[str, Any], config: rl.RandLoraConfig, mesh: Any) -> None:
    assert_type(rl.summary(variables, config, tokens=3, strategy="auto"), str)
    assert_type(rl.matching_config(variables, config, lora_rank=16), rl.RandLoraConfig)
    assert_type(rl.matching_config(variables, config, max_parameters=1000), rl.RandLoraConfig)
    assert_type(rl.num_parameters([(8, 8)], r=2), int)
    assert_type(rl.labels(variables, config), dict[str, Any])
    assert_type(rl.split(variables, config), tuple[dict[str, Any], dict[str, Any]])
    assert_type(rl.combine(*rl.split(variables, config)), dict[str, Any])
    assert_type(rl.merge(variables, config), dict[str, Any])
    assert_type(rl.sharding(variables, config, mesh, data_axes=("data",)), dict[str, Any])
    assert_type(rl.draw_bases(config, 8, 8, jnp.bfloat16), dict[str, jax.Array])


def layers() -> None:
    rl.register_layer(Einsum, kernel="w", plain=True)
    rl.register_layer(Einsum, "w", (0, 1))
    rl.register_layer(Einsum, "w", lambda layer, shape, args, kwargs: (1,))
