"""Layers of other people's libraries, by the names of their classes: nothing here imports them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

# Of mixtures of experts: the gate and the value of one expert can be one kernel (experts, 2, f, d).
_OPENING, _CLOSING, _BOTH = "ecd,edf->ecf", "ecf,efd->ecd", "ecd,ekfd->eckf"


def _named(layer: Any) -> str:
    return layer.weight_name


def _unscaled(layer: Any) -> bool:
    return layer.w_scale is None


def _without_lora(layer: Any) -> bool:
    return layer.lora_config is None


def _experts_of_gemma(layer: Any) -> dict[str, str]:
    """Of a layer that only holds the kernel, for `ragged_dot`: its place says which it is."""
    use = {"gating_einsum": _BOTH, "linear": _CLOSING}.get(layer.name)
    return {layer.weight_name: use} if use else {}


def _dense_of_maxtext(layer: Any) -> dict[str, Any]:
    inputs, outputs = len(layer.axis), len(layer.out_features_shape)
    letters = "abcdefghijklm"[: inputs + outputs]
    ins, outs = letters[:inputs], letters[inputs:]
    last = tuple(layer.axis) == tuple(range(-inputs, 0))
    return {"kernel": f"...{ins},{letters}->...{outs}" if last else tuple(range(inputs))}


def _experts_of_maxtext(layer: Any) -> dict[str, str]:
    names = {"wi": _OPENING, "wi_0": _OPENING, "wi_1": _OPENING, "wo": _CLOSING}
    there = lambda name: isinstance(vars(layer).get(name), nnx.Variable)
    return {name: equation for name, equation in names.items() if there(name)}


_EINSUM: dict[str, Any] = {"kernel": "w", "plain": True}
_GEMMAS: dict[str, Any] = {"kernel": _named, "plain": True}
_MAXTEXTS: dict[str, Any] = {
    "kernel": _dense_of_maxtext,
    "kernel_shape": lambda layer: (*layer.in_features_shape, *layer.out_features_shape),
}
# What `registry.LayerRule` has, by the class's qualified name.
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "gemma.gm.nn._layers.Einsum": _GEMMAS,
    "gemma.gm.nn.gemma3n._layers.Einsum": {"kernel": _named, "plain": _unscaled},
    "gemma.gm.nn.gemma4._layers.Einsum": {"kernel": _named, "plain": _unscaled},
    "gemma.gm.nn.gemma4._layers.ClippedEinsum": {"kernel": _named},
    "gemma.gm.nn.gemma4._moe._Weight": {"kernel": _experts_of_gemma},
    "maxtext.layers.linears.DenseGeneral": {**_MAXTEXTS, "plain": True},
    "maxtext.layers.moe.GateLogit": _MAXTEXTS,
    "maxtext.layers.moe.RoutedMoE": {"kernel": _experts_of_maxtext},
    "maxtext.models.gemma3.Einsum": _EINSUM,
    "openpi.models.lora.Einsum": {"kernel": "w", "plain": _without_lora},
    "openpi.models.lora.FeedForward": {"kernel": {"gating_einsum": 1, "linear": 0}},
    "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D": {
        "kernel": {"kernel": "...i,oi->...o"},
        "plain": True,
    },
    "tunix.models.gemma.model.Einsum": _EINSUM,
    "tunix.models.gemma3.model.Einsum": _EINSUM,
    "tunix.models.gemma4.model.Einsum": {"kernel": "w", "plain": _unscaled},
    "tunix.models.gemma4.moe.MoERagged": {"kernel": {"gating_einsum": _BOTH, "linear": _CLOSING}},
    "tunix.models.llama3.model.Einsum": _EINSUM,
    "tunix.models.qwen2.model.Einsum": _EINSUM,
    "tunix.models.qwen3.model.Einsum": _EINSUM,
    "tunix.models.qwen3.model.MoELayer": {
        "kernel": {"gate_proj": _OPENING, "up_proj": _OPENING, "down_proj": _CLOSING}
    },
}

_BRIDGES = {f"maxtext.layers.nnx_wrappers.{name}" for name in ("ToLinen", "ToNNX")}


def is_bridge(cls: type) -> bool:
    """Whether modules of the class hold one of Flax's other kind."""
    named = {f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__}
    return issubclass(cls, (nnx.bridge.ToNNX, nnx.bridge.ToLinen)) or bool(named & _BRIDGES)
