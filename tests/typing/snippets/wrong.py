"""Mistakes: on each marked line both checkers must name the word behind the mark."""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import randlora_jax as rl
from randlora_jax import nnx as rl_nnx
from randlora_jax.linen import RandLora


def config(one: rl.RandLoraConfig) -> None:
    rl.RandLoraConfig(bias="some")  # wrong: bias
    rl.RandLoraConfig(rank=4)  # wrong: rank
    rl.RandLoraConfig(r="4")  # wrong: r
    rl.RandLoraConfig(4)  # wrong: positional
    rl.RandLoraConfig(target_modules=[1])  # wrong: int
    rl.RandLoraConfig(target_modules=3)  # wrong: target_modules
    rl.RandLoraConfig(modules_to_save=3)  # wrong: modules_to_save
    rl.RandLoraConfig(layers_to_transform="0")  # wrong: layers_to_transform
    rl.RandLoraConfig(sparse="yes")  # wrong: sparse
    one.replace(rank=4)  # wrong: rank
    one.replace(bias="some")  # wrong: bias
    one.r = 3  # wrong: r
    one.to_dictionary()  # wrong: to_dictionary


def linen(base: nn.Module, config: rl.RandLoraConfig, x: jax.Array) -> None:
    RandLora(base)  # wrong: config
    RandLora(base, config, strategy="fast")  # wrong: strategy
    RandLora(base, config, stratgy="auto")  # wrong: stratgy
    RandLora(base, "all-linear")  # wrong: str
    RandLora(base, config, active="chat")  # wrong: active
    RandLora(base, config, deterministic="no")  # wrong: deterministic
    RandLora(base, config, parameters={"w": 1.5})  # wrong: float
    RandLora(config, base)  # wrong: RandLoraConfig
    RandLora(base, {"chat": 3})  # wrong: int
    model = RandLora(base, config)
    model.adapt(variables=3)  # wrong: variables
    model.merge({"params": {}}, safe="no")  # wrong: safe


def in_place(model: nnx.Linear, config: rl.RandLoraConfig, path: pathlib.Path) -> None:
    rl_nnx.inject(model)  # wrong: config
    rl_nnx.inject(nn.Dense(3), config)  # wrong: Dense
    rl_nnx.inject(model, config, strategy="fast")  # wrong: strategy
    rl_nnx.inject(model, config, strateg="auto")  # wrong: strateg
    rl_nnx.inject(model, config, ("chat",))  # wrong: positional
    _ = rl_nnx.inject(model, config).kernal  # wrong: kernal
    _ = rl_nnx.merge(model).kernal  # wrong: kernal
    _ = rl_nnx.remove(model).kernal  # wrong: kernal
    rl_nnx.merge(model, save=True)  # wrong: save
    rl_nnx.set_active(model, "chat")  # wrong: str
    rl_nnx.load_adapter(path, model, strateg="auto")  # wrong: strateg
    rl_nnx.load_adapter(path, model, strategy="fast")  # wrong: strategy
    rl_nnx.load_adapter(path, path)  # wrong: Path
    rl_nnx.update(model)  # wrong: values


def files(variables: Mapping[str, Any], config: rl.RandLoraConfig, path: pathlib.Path) -> None:
    rl.save_adapter(path, variables, config, overwite=True)  # wrong: overwite
    rl.save_adapter(path, config, variables)  # wrong: RandLoraConfig
    rl.save_adapter(path, variables)  # wrong: config
    rl.load_adapter(path)  # wrong: variables
    rl.load_adapter(path=3, variables=variables)  # wrong: path
    rl.AdapterSave(variables)  # wrong: config
    rl.AdapterRestore(variables, confg=config)  # wrong: confg
    rl.peft.load_adapter(path, variables, adapter="chat")  # wrong: adapter
    rl.peft.load_adapter(path, variables, name_map=3)  # wrong: name_map
    rl.peft.save_adapter(path, variables, {"chat": config})  # wrong: dict[str, RandLoraConfig]
    rl.peft.NameMap("transformer")  # wrong: str


def several(variables: Mapping[str, Any], config: rl.RandLoraConfig) -> None:
    rl.adapters.select(variables, {"chat": config})  # wrong: name
    rl.adapters.select(variables, {"chat": 3}, "chat")  # wrong: int
    rl.adapters.insert(variables, {"chat": config}, "code", variables)  # wrong: insert
    _ = rl.adapters.inserted  # wrong: inserted


def reports(variables: Mapping[str, Any], config: rl.RandLoraConfig) -> None:
    rl.summary(variables, config, token=3)  # wrong: token
    rl.summary(variables, config, strategy="fast")  # wrong: strategy
    rl.matching_config(variables, config, lora="x")  # wrong: lora
    rl.matching_config(variables, config, lora_rank="x")  # wrong: lora_rank
    rl.num_parameters([8], r=2)  # wrong: int
    rl.split(variables)  # wrong: config
    rl.labels(config, variables)  # wrong: RandLoraConfig
    rl.combine(variables)  # wrong: frozen
    rl.merge(variables, config, save=True)  # wrong: save
    rl.sharding(variables, config, data_axis=["data"])  # wrong: data_axis
    rl.draw_bases(config, max_dim="8", min_dim=8)  # wrong: max_dim
    rl.partition(variables, {"chat": config})  # wrong: config
    rl.delta_wait(jnp.ones(3))  # wrong: delta_wait


def layers(layer: nn.Dense) -> None:
    rl.register_layer(nn.Dense, plane=True)  # wrong: plane
    rl.register_layer(nn.Dense, plain="yes")  # wrong: plain
    rl.register_layer(nn.Dense, kernel=3)  # wrong: kernel
    rl.register_layer(nn.Dense, input_axes=1.5)  # wrong: input_axes
    rl.register_layer(layer)  # wrong: Dense
