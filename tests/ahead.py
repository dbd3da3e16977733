"""A process of its own: compiles a step on a mesh, and says whether JAX's cache had it."""

import json
import sys

import jax
from jax import export

import randlora_jax as rl
from randlora_jax.linen import RandLora
from tests import pods

CONFIG = rl.RandLoraConfig(r=16, randlora_alpha=16, target_modules="all-linear")
STRATEGIES = ("merged", "factored")
LAYOUT = pods.LAYOUTS["2x2x2"]


def arrays():
    """(mesh, variables with scales that act, batch)."""
    mesh = LAYOUT.devices()
    with jax.set_mesh(mesh):
        params, x = pods.placed_params(LAYOUT, mesh), pods.batch(LAYOUT, mesh)
        variables = RandLora(pods.Net(LAYOUT), CONFIG).adapt({"params": params}, x)
    scales = jax.tree.map(lambda a: a + 0.01, variables["randlora"])
    return mesh, {**variables, "randlora": scales}, x


def loss(strategy, variables, x):
    """The loss of a model that is told of its layout, as a jitted function."""
    model = RandLora(pods.Net(LAYOUT), CONFIG, strategy=strategy).with_layout(variables, x)
    return jax.jit(lambda variables, x: pods.loss(model.apply(variables, x)))


def main(cache, exported):
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    mesh, variables, x = arrays()
    found, events = {}, []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    with jax.set_mesh(mesh):
        for strategy in STRATEGIES:
            events.clear()
            value = loss(strategy, variables, x)(variables, x)
            found[strategy] = any("cache_hits" in event for event in events), float(value)
        with open(exported, "rb") as file:
            call = export.deserialize(file.read()).call
        found["exported"] = False, float(jax.jit(call)(variables, x))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
