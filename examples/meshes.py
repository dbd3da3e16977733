"""Where the example's model lives: one device, or a mesh, of one process or of many."""

import io
import os
import re
import sys

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

SECOND_SIDE = ("o_proj", "down_proj")  # their inputs are the outputs of the other projections


def join():
    """Joins the other processes: of a cluster that JAX knows, or as the environment says.

    The environment is JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Files are
    the same for all; the first process alone speaks.
    """
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    jax.distributed.initialize(
        **{k: int(os.environ[v]) for k, v in names.items() if v in os.environ}
    )
    if jax.process_index():
        sys.stdout = io.StringIO()


def make(text):
    """The mesh of a text like "4x2": FSDP over 4 devices, tensor parallel over 2. None: no mesh."""
    if text is None:
        return None
    shape = tuple(map(int, text.split("x"))) if re.fullmatch(r"[1-9]\d*x[1-9]\d*", text) else ()
    if len(shape) != 2 or shape[0] * shape[1] != jax.device_count():
        raise ValueError(
            f"--mesh {text} must be DATAxMODEL, such as {jax.device_count()}x1, with the "
            f"{jax.device_count()} devices there are"
        )
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def divide(params, mesh):
    """A Llama's parameters on the mesh; adapters follow them by `randlora_jax.sharding`."""

    def spec(path, leaf):
        module, name = (key.key for key in path[-2:])
        if name == "embedding":
            return P("model", "data")
        if name != "kernel":
            return P()
        sides = ("model", "data") if module in SECOND_SIDE else ("data", "model")
        return P(*[None] * (leaf.ndim - 2), *sides)

    place = lambda path, leaf: jax.device_put(leaf, NamedSharding(mesh, spec(path, leaf)))
    return params if mesh is None else jax.tree_util.tree_map_with_path(place, params)


def put(tree, mesh, *axes):
    """Arrays that are on no mesh yet, divided along `axes`; without any, whole on all devices."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, P(*axes))
    there = lambda leaf: isinstance(getattr(leaf, "sharding", None), NamedSharding)
    return jax.tree.map(lambda a: a if there(a) else jax.device_put(a, sharding), tree)
