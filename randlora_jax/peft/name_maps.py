"""Names of torch's modules as places in a Flax tree, by patterns; ready ones for known models."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from randlora_jax import trees

Place = tuple[trees.Path, int | None]  # a module's path, and its number where layers are stacked


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Renames modules by their first parts, in both directions; the first pair that fits counts.

    Attributes:
      prefixes: (torch's, Flax's) pairs of dotted prefixes, or whole names. `{}` stands for a
        number. If Flax's does not have it, it is that of a layer in a stack, or of an expert: the
        kernel has a leading axis for them. Of two, one has a name: `{layer}`. A kernel that is not
        called "kernel", or has other axes than (in, out), is named with its input axes, as `adapt`
        names it: "w[0]", "w[0;1]" of experts.

    Example:
      >>> name_map = NameMap((("transformer.h.{}", "blocks"), ("transformer", "")))
      >>> name_map("transformer.h.3.mlp.c_fc"), name_map("transformer.wte")
      ((('blocks', 'mlp', 'c_fc'), 3), ('wte',))
      >>> name_map.inverse(("blocks", "mlp", "c_fc"), 3)
      'transformer.h.3.mlp.c_fc'
      >>> NameMap((("h.{layer}.experts.{}.up", "h_{layer}.up[0;1]"),))("h.2.experts.7.up")
      (('h_2', 'up[0;1]'), 7)
    """

    prefixes: tuple[tuple[str, str], ...]

    def __call__(self, name: str) -> trees.Path | Place | None:
        for theirs, ours in self.prefixes:
            found = _match(theirs, name)
            if found:
                numbers, rest = found
                path = (*parts_of(_filled(ours, numbers)), *parts_of(rest))
                index = [n for key, n in numbers.items() if key not in _placeholders(ours)]
                return (path, int(index[0])) if index else path
        return None

    def inverse(self, path: trees.Path, index: int | None = None) -> str | None:
        """The name of the module at a place, None if the place has none."""
        for theirs, ours in self.prefixes:
            found = _match(ours, ".".join(path))
            if found:
                numbers, rest = found
                left = [key for key in _placeholders(theirs) if key not in numbers]
                if bool(left) != (index is not None):
                    return None
                numbers |= dict.fromkeys(left, str(index))
                return ".".join((*parts_of(_filled(theirs, numbers)), *parts_of(rest)))
        return None

    def moved(self, module: str, to: str) -> NameMap:
        """The same map for a torch model that has a module, and all within it, elsewhere.

        A language model within one that sees, as of Gemma 3 from 4B on, is an example:

          >>> inside = llama_name_map.moved("model", "model.language_model")
          >>> inside("model.language_model.layers.3.mlp.up_proj"), inside("lm_head")
          ((('layers', 'mlp', 'up_proj'), 3), ('lm_head',))
        """
        within = lambda name: name == module or name.startswith(module + ".")
        theirs = [name for name, _ in self.prefixes]
        if "" in theirs or not any(map(within, theirs)):
            raise ValueError(
                f"the map takes names that begin with {theirs}: no module {module!r} that could "
                "be elsewhere"
            )
        return NameMap(
            tuple(
                (to + theirs.removeprefix(module) if within(theirs) else theirs, ours)
                for theirs, ours in self.prefixes
            )
        )


def _placeholders(template: str) -> list[str]:
    return re.findall(r"\{(\w*)\}", template)


def _match(template: str, name: str) -> tuple[dict[str, str], str] | None:
    """The numbers in a name that begins as the template says, and what comes after it."""
    literal, *others = re.split(r"\{\w*\}", template)
    pattern = re.escape(literal) + "".join(rf"(\d+){re.escape(part)}" for part in others)
    found = re.match(pattern + (r"(?:\.|$)" if template else ""), name)
    if not found:
        return None
    return dict(zip(_placeholders(template), found.groups(), strict=True)), name[found.end() :]


def _filled(template: str, numbers: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w*)\}", lambda found: numbers[found[1]], template)


def parts_of(name: str) -> trees.Path:
    return tuple(name.split(".")) if name else ()


llama_name_map: NameMap = NameMap(
    (("model.layers.{}", "layers"), ("lm_head", "lm_head"), ("score", "score"), ("model", ""))
)
"""Hugging Face's names of a Llama onto a Flax one with `nn.scan`, that of `examples/smollm2.py`.

Mistral, Qwen 2 and 3, and Gemma have the same names.
"""

_LAYER, _ATTENTION = "model.layers.{layer}.", ("q_proj", "k_proj", "v_proj")
tunix_name_map: NameMap = NameMap(
    (
        *((f"{_LAYER}self_attn.{n}", f"layers.{{layer}}.attn.{n}.w[0]") for n in _ATTENTION),
        (f"{_LAYER}self_attn.o_proj", "layers.{layer}.attn.o_proj.w[0,1]"),
        *(
            (f"{_LAYER}mlp.experts.{{}}.{n}", f"layers.{{layer}}.mlp.{n}[0;1]")
            for n in ("gate_proj", "up_proj", "down_proj")
        ),
        (f"{_LAYER}mlp.gate", "layers.{layer}.mlp.router"),
        ("model.layers.{}", "layers.{}"),
        ("lm_head", "lm_head.w[0]"),
    )
)
"""Hugging Face's names of a Llama, Qwen 2 or Qwen 3 onto tunix's NNX model, its experts too."""

gemma_name_map: NameMap = NameMap(
    (
        (f"{_LAYER}self_attn.q_proj", "layer_{layer}.attn.q_einsum.w[1]"),
        (f"{_LAYER}self_attn.o_proj", "layer_{layer}.attn.attn_vec_einsum.w[0,1]"),
        (f"{_LAYER}mlp.down_proj", "layer_{layer}.mlp.linear[0]"),
    )
)
"""Hugging Face's names of a Gemma onto the Linen model of the package gemma.

That keeps keys and values in one kernel, and gate and up in another, where torch has a module and
an update for each: such modules have no place.
"""

_GPT2_BLOCKS = ("transformer.h.{layer}", "h.{layer}")
_GPT2_KERNELS = (
    *("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    *("crossattention.c_attn", "crossattention.q_attn", "crossattention.c_proj"),
)
gpt2_name_map: NameMap = NameMap(
    (
        *(
            (f"{block}.{name}", f"{block}.{name}.kernel[1]")
            for block in _GPT2_BLOCKS
            for name in _GPT2_KERNELS
        ),
        ("", ""),
    )
)
"""Hugging Face's names of a GPT-2 onto the Flax model of transformers 4, with kernels (out, in).

Its Flax models of Llama, Mistral, Gemma, BERT, ViT and T5 have torch's names, and need no map.
"""
