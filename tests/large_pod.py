"""A process with 64 devices: what a step exchanges at the shapes of a model of 70B, never run."""

import json
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax.linen import RandLora
from tests import pods

WIDTH, SIZES = 8192, (28672, 64)
X = (64, 512, WIDTH)  # 512 tokens of each of 64 examples
CONFIG = rl.RandLoraConfig(r=512, randlora_alpha=512, target_modules="all-linear")
_AXES = {"opening": P("fsdp", "model"), "closing": P("model", "fsdp"), "batch": P("fsdp")}
LAYOUTS = {
    "1 x 8 x 8": pods.Layout({"data": 1, "fsdp": 8, "model": 8}, **_AXES),
    "1 x 64 x 1": pods.Layout({"data": 1, "fsdp": 64, "model": 1}, **_AXES),
    "sequence": pods.Layout(
        {"data": 1, "fsdp": 8, "model": 8},
        **{**_AXES, "batch": P("fsdp", "model")},
        residual=P("fsdp", "model", None),
    ),
}


def main(name):
    layout = LAYOUTS[name]
    mesh = layout.devices()
    there = lambda a, spec: jax.ShapeDtypeStruct(
        a.shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )
    net = pods.Net(layout, 1, SIZES)
    x = there(jax.ShapeDtypeStruct(X, jnp.bfloat16), layout.batch)
    with jax.set_mesh(mesh):
        params = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
        params = jax.tree_util.tree_map_with_path(
            lambda path, a: there(a, pods.spec_of(path, a, layout)), params
        )
        model = RandLora(net, CONFIG, bases_dtype=jnp.bfloat16)
        variables = jax.eval_shape(lambda p, x: model.adapt({"params": p}, x), params, x)
        shardings = rl.sharding({**variables, "params": params}, CONFIG, mesh)
        variables = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), variables, shardings
        )
        trainable, frozen = rl.split(variables, CONFIG)
        base = jax.value_and_grad(lambda x, p: pods.loss(net.apply({"params": p}, x)))
        compiled = [jax.jit(base).lower(x, params).compile()]
        for adapted in (model, model.with_layout(variables, x)):
            step = jax.value_and_grad(
                lambda t, x, f, m=adapted: pods.loss(m.apply(rl.combine(t, f), x)), (0, 1)
            )
            compiled.append(jax.jit(step).lower(trainable, x, frozen).compile())
    scales = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(trainable))
    json.dump([*map(pods.exchanged, compiled), scales], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
