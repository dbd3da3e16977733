"""Adapters on disk, through Orbax: folders of their own, or items of a user's checkpoints."""

from randlora_jax.checkpoint.folders import load_adapter, save_adapter
from randlora_jax.checkpoint.orbax_items import AdapterRestore, AdapterSave
from randlora_jax.checkpoint.pinned import pin_adapter

__all__ = ["AdapterRestore", "AdapterSave", "load_adapter", "pin_adapter", "save_adapter"]
