"""How long RandLoRA takes to compile on a mesh, and to call without `jax.jit`, beside its rivals.

    python examples/compile_time.py                  # 32 layers on 8 devices, three rounds
    python examples/compile_time.py --layers 2 --repeats 1

The model is unrolled, as people write it: each layer is compiled by itself. Each round compiles and
calls every method once, so that a ratio compares runs of the same minute.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import time

# Before JAX looks for its devices: this host's CPU as eight.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora
from randlora_jax.nnx import inject

CLOSING = ("o", "down")  # their inputs are divided as the outputs of the other layers are


class Block(nn.Module):
    """Attention and an MLP, of one width and four times that."""

    @nn.compact
    def __call__(self, x):
        width, split = x.shape[-1], lambda y: y.reshape(*x.shape[:2], -1, 64)
        dense = lambda name, width: nn.Dense(width, use_bias=False, name=name)
        h = nn.RMSNorm()(x)
        attended = jax.nn.dot_product_attention(*(split(dense(n, width)(h)) for n in "qkv"))
        x = x + dense("o", width)(attended.reshape(x.shape))
        h = nn.gelu(dense("up", 4 * width)(nn.RMSNorm()(x)))
        return x + dense("down", width)(h)


class Transformer(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = Block(name=f"block_{i}")(x)
        return x


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    return parser.parse_args(argv)


def placed(params, mesh):
    """Kernels divided among all devices, tensor parallel along one axis, FSDP along the other."""

    def put(path, leaf):
        sides = ("model", "data") if path[-2].key in CLOSING else ("data", "model")
        spec = P(*sides) if leaf.ndim == 2 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(put, params)


def methods(args, mesh):
    """(name, apply, what trains, what does not) of each that is installed."""
    net = Transformer(args.layers)
    x = jax.device_put(jnp.ones((16, 64, args.width)), NamedSharding(mesh, P("data")))
    params = placed(jax.jit(net.init)(jax.random.key(0), x)["params"], mesh)
    yield "frozen base", lambda t, f, x: net.apply({"params": f}, x), {}, params, x
    if importlib.util.find_spec("qwix"):
        import qwix

        provider = qwix.LoraProvider(module_path=".*", rank=16, alpha=16.0)
        lora = qwix.apply_lora_to_model(net, provider)
        shapes = jax.eval_shape(lora.init, jax.random.key(0), x)["params"]
        new = trees.filtered(shapes, lambda path, _: path[-1].startswith("kernel_lora"))
        new = jax.tree.map(
            lambda s: jax.device_put(jnp.ones(s.shape), NamedSharding(mesh, P())), new
        )
        apply = lambda t, f, x: lora.apply({"params": rl.combine(t, f)}, x)
        yield "LoRA (qwix, rank 16)", apply, new, params, x
    config = rl.RandLoraConfig(r=32, target_modules="all-linear")
    adapted = RandLora(net, config)
    variables = adapted.adapt({"params": params}, x)
    trainable, frozen = rl.split(variables, config)
    ways = {"with_layout": adapted.with_layout(variables, x), "told by the compiler": adapted}
    for name, model in ways.items():
        apply = lambda t, f, x, model=model: model.apply(rl.combine(t, f), x)
        yield f"RandLoRA, {name}", apply, trainable, frozen, x


def compiled(apply, trainable, frozen, x):
    """Seconds to trace, lower and compile a loss and its gradients."""
    jax.clear_caches()
    loss = lambda t, x, f: jnp.mean(jnp.square(apply(t, f, x)))
    begun = time.perf_counter()
    jax.jit(jax.value_and_grad(loss, (0, 1))).lower(trainable, x, frozen).compile()
    return time.perf_counter() - begun


def eager():
    """(name, plain layer's call, adapted one's) of one layer in either front end."""
    config, x = rl.RandLoraConfig(r=32, target_modules="all-linear"), jnp.ones((8, 256))
    dense = nn.Dense(256)
    adapted = RandLora(dense, config)
    variables = adapted.init(jax.random.key(0), x)
    base = {"params": variables["params"]}
    yield "nn.Dense", functools.partial(dense.apply, base, x), lambda: adapted.apply(variables, x)
    layers = [nnx.Linear(256, 256, rngs=nnx.Rngs(0)) for _ in range(2)]
    inject(layers[1], config)
    yield "nnx.Linear", *(functools.partial(layer, x) for layer in layers)


def called(call, times=100):
    """Milliseconds of a call, after one that is not counted."""
    jax.block_until_ready(call())
    begun = time.perf_counter()
    for _ in range(times):
        y = call()
    jax.block_until_ready(y)
    return (time.perf_counter() - begun) / times * 1e3


def rounds(repeats, measures):
    """{name: what each round measured}, every name once in a round."""
    found = {name: [] for name, _ in measures}
    for _ in range(repeats):
        for name, measure in measures:
            found[name].append(measure())
    return found


def over(found, name, rival):
    """The median of the ratios of a round."""
    if rival not in found:
        return "-"
    each = (a / b for a, b in zip(found[name], found[rival], strict=True))
    return f"{statistics.median(each):.2f}"


def main(argv=None):
    from rich.console import Console
    from rich.table import Table

    args, console = parse(argv), Console(width=100)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        measures = [
            (name, functools.partial(compiled, *rest)) for name, *rest in methods(args, mesh)
        ]
        found = rounds(args.repeats, measures)
    rivals = ("frozen base", "LoRA (qwix, rank 16)")
    title = f"Tracing and compiling {args.layers} layers of width {args.width}, 8 devices"
    table = Table("method", "seconds", *(f"over {rival}" for rival in rivals), title=title)
    for name, seconds in found.items():
        ratios = (over(found, name, rival) for rival in rivals)
        table.add_row(name, f"{statistics.median(seconds):.1f}", *ratios)
    console.print(table)
    table = Table(
        "layer", "plain, ms", "RandLoRA, ms", "over plain", title="A call without jax.jit"
    )
    for name, plain, adapted in eager():
        pair = [("plain", functools.partial(called, plain))]
        pair += [("adapted", functools.partial(called, adapted))]
        found = rounds(max(args.repeats, 3), pair)
        medians = (f"{statistics.median(found[kind]):.2f}" for kind in ("plain", "adapted"))
        table.add_row(name, *medians, over(found, "adapted", "plain"))
    console.print(table)
    console.print(f"jax {jax.__version__}, {jax.default_backend()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
