"""PEFT's adapters on disk, onto a Flax base and back."""

from __future__ import annotations

import os
from typing import Any

from randlora_jax import trees
from randlora_jax.bases import shared_dims
from randlora_jax.checks import check_config, check_variables
from randlora_jax.config import RandLoraConfig
from randlora_jax.peft import files
from randlora_jax.peft.exporting import to_peft
from randlora_jax.peft.importing import onto_base
from randlora_jax.peft.names import Names
from randlora_jax.peft.tensors import Layout, check_layout
from randlora_jax.stored import possible_features, sites_of


def load_adapter(
    directory: str | os.PathLike[str],
    variables: trees.Tree,
    name_map: Names = None,
    *,
    adapter_name: str = "default",
) -> tuple[dict[str, Any], RandLoraConfig]:
    """Loads an adapter that PEFT saved, in any of its layouts, onto a Flax base.

    Args:
      directory: the folder with `adapter_config.json` and `adapter_model.safetensors`.
      variables: the base's, `{"params": ...}`; it is not changed and not copied.
      name_map: a function, a mapping or a `NameMap` from PEFT's name of a module to its path in
        `params` (dotted, or a tuple), or to (path, index) where layers are stacked. A kernel that
        is not called "kernel" has its input axes in its path: "attn.q.w[1]". None: the same names.
      adapter_name: of PEFT's adapters in sub-folders, which one.

    Returns:
      (variables, config), the variables as `adapt` returns them. Exactly ternary bases are int8
      signs with their sizes, as `draw_bases` has them. The config is the file's, except where the
      package's docstring says. Weights of the base that PEFT stores beside an adapter (of an
      adapted `lm_head`, or for `save_embedding_layers=True`) are passed over where they equal those
      of the base here; others take their place, and are in `modules_to_save` then. Both are told in
      a warning.

    Raises:
      FileNotFoundError: if there is no adapter.
      ValueError: if it is damaged, incomplete, a pickle, of another model or of another method.
    """
    check_variables(variables, "params")
    folder, adapter = files.read_adapter(directory, adapter_name)
    try:
        return onto_base(adapter, variables, name_map)
    except ValueError as error:
        raise ValueError(f"{folder} does not fit: {error}") from None


def save_adapter(
    directory: str | os.PathLike[str],
    variables: trees.Tree,
    config: RandLoraConfig,
    name_map: Names = None,
    *,
    adapter_name: str = "default",
    layout: Layout = "shared",
    overwrite: bool = False,
) -> int:
    """Saves an adapter for PEFT's `PeftModel.from_pretrained`; one there is kept if this fails.

    Args:
      directory: the folder; its sub-folder `adapter_name`, if that is not "default".
      variables: as `adapt` or `load_adapter` returned them, trained.
      config: one adapter's. `exclude_modules`, "all-linear", and targets that would mean other
        modules by PEFT's names become a list of whole names.
      name_map: as for `load_adapter`, but it is needed in the other direction: of a function,
        give the mapping `{name: function(name) for name in names}`, with the torch model's
        `named_modules()` or `module_names(folder)` for names.
      layout: "shared" writes one pair of bases, at the level of the model, as PEFT does since its
        PR 3714. PEFT 0.21.2 loads it to the same bits, and warns that the layers have none.
        "copies" writes a pair beside every layer too, as 0.21.2 does: they are nearly all of the
        file then. transformers' own loader (`model.load_adapter`, or `AutoModel.from_pretrained`
        of the folder) and `set_peft_model_state_dict` on an injected model find bases there alone,
        and draw others if there are none.
      overwrite: replace an adapter of PEFT's.

    Returns:
      The size of the weights' file in bytes.

    Raises:
      FileExistsError: if there is something in the folder that would be lost.
      ValueError: if a module has no name, the scales don't fit the base, `layout` is neither, or
        `task_type` is one for which PEFT wants a head in the file that is not trained here.

    Example:
      >>> import tempfile, flax.linen as nn, jax, jax.numpy as jnp
      >>> from randlora_jax.linen import RandLora
      >>> config = RandLoraConfig(r=2, target_modules=["layers_0"])
      >>> model, x = RandLora(nn.Sequential([nn.Dense(5)]), config), jnp.ones((1, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   size = save_adapter(folder, variables, config)
      ...   loaded, _ = load_adapter(folder, {"params": variables["params"]})
      >>> same = jax.tree.map(lambda a, b: bool((a == b).all()), loaded, variables)
      >>> jax.tree.all(same)
      True
    """
    check_variables(variables, "params", "randlora", "randlora_bases")
    check_config(config)
    check_layout(layout)
    folder = files.folder_of(directory, adapter_name)
    sites = sites_of(variables, config, guess=True)
    stacks = {site.path: site.stack for site in sites}
    sizes = shared_dims(possible_features(variables, config))
    adapter = to_peft(variables, config, name_map, stacks, sizes)
    return files.write(folder, adapter, layout, overwrite)


def module_names(directory: str | os.PathLike[str], adapter_name: str = "default") -> list[str]:
    """PEFT's names of the modules that an adapter of its has something for."""
    _, adapter = files.read_adapter(directory, adapter_name)
    return sorted({*adapter.scales, *(module for module, _ in adapter.others | adapter.of_base)})
