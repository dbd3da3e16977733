"""Ways to fine-tune one model, told alike: what trains, what stays, what the kernels become."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from smollm2 import PROJECTIONS

import randlora_jax as rl
from randlora_jax import trees
from randlora_jax.linen import RandLora

FULL, LORA, RANDLORA, VARIED = "full fine-tuning", "LoRA", "RandLoRA", "RandLoRA, varied"
VARIANTS = ("gamma-fixed", "gamma-from-0", "alpha-x10", "alpha-x0.1")


@dataclasses.dataclass(frozen=True)
class Rival:
    """A way to train a model.

    Attributes:
      parameters: how many train.
      start: seed -> (trainable, frozen), two trees.
      apply: (trainable, frozen, tokens) -> logits.
      rate: the learning rate at which to begin to look for the best.
      updates: (trainable, frozen) -> {path of a kernel: what was added to it, of its shape}.
    """

    family: str
    name: str
    parameters: int
    rate: float
    start: Callable
    apply: Callable
    updates: Callable


def full(llama, params):
    """Every parameter trains."""

    def updates(trainable, _):
        before = dict(trees.items(params))
        return {path: new - before[path] for path, new in trees.items(trainable) if adapted(path)}

    return Rival(FULL, FULL, size(params), 1e-4, lambda seed: (params, {}),
                 lambda t, _, tokens: llama.apply({"params": t}, tokens), updates)  # fmt: skip


def lora(llama, params, rank):
    """LoRA through qwix on the projections; alpha is the rank, so that the update is a @ b."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    model, factors, frozen = qwix_lora(llama, params, tokens, rank)

    def updates(trainable, _):
        flat = dict(trees.items(trainable))
        ends = ((path, path[-1].removesuffix("_lora_a")) for path in flat)
        return {
            (*path[:-1], name): flat[path] @ flat[(*path[:-1], f"{name}_lora_b")]
            for path, name in ends if name != path[-1]
        }  # fmt: skip

    apply = lambda t, f, tokens: model.apply({"params": rl.combine(t, f)}, tokens)
    count = size(jax.eval_shape(lambda: factors(0)))
    start = lambda seed: (factors(seed), frozen)
    return Rival(LORA, f"LoRA k={rank}", count, 3e-3, start, apply, updates)


def qwix_lora(llama, params, tokens, rank, **quantised):
    """(model, seed -> its new parameters, the others): LoRA as qwix gives it, on any base."""
    import qwix

    provider = qwix.LoraProvider(module_path=".*_proj", rank=rank, alpha=float(rank), **quantised)
    model = qwix.apply_lora_to_model(llama, provider)

    @jax.jit
    def factors(seed):
        new = model.init(jax.random.key(seed), tokens)["params"]
        return trees.filtered(new, lambda path, _: "_lora_" in path[-1])

    given = dict(trees.items(params))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    boxes = {p: leaf for p, leaf in trees.items(shapes) if hasattr(leaf, "how")}  # of codes
    frozen = given | {path: box.replace(array=given[path]) for path, box in boxes.items()}
    return model, factors, trees.build(frozen)


def randlora(llama, params, config):
    """Ours, on the projections."""
    model = RandLora(llama, config)

    def start(seed):
        seeded = RandLora(llama, config.replace(projection_prng_key=seed))
        return rl.split(seeded.adapt({"params": params}, jnp.zeros((1, 8), jnp.int32)), config)

    def updates(trainable, frozen):
        # A merge into kernels of zero is the update alone, without what rounding to W would lose.
        zeros = trees.filtered(params, lambda path, _: adapted(path))
        zeros = jax.tree.map(jnp.zeros_like, zeros)
        variables = {**rl.combine(trainable, frozen), "params": trees.union(params, zeros)}
        return {path: w for path, w in trees.items(model.merge(variables)) if adapted(path)}

    count = size(jax.eval_shape(lambda: start(0)[0]))
    apply = lambda t, f, tokens: model.apply(rl.combine(t, f), tokens)
    return Rival(RANDLORA, f"RandLoRA r={config.r}", count, 1e-3, start, apply, updates)


def varied(llama, params, config, kind):
    """A RandLoRA that starts otherwise, or has another alpha: one of `VARIANTS`."""
    rival = randlora(llama, params, config)

    def is_gamma(path, _):
        return path[-1].endswith("gamma")

    def fixed(seed):
        trainable, frozen = rival.start(seed)
        gamma = trees.filtered(trainable, is_gamma)
        return trees.filtered(trainable, lambda *at: not is_gamma(*at)), trees.union(frozen, gamma)

    def swapped(seed):
        trainable, frozen = rival.start(seed)
        first = lambda a: jnp.full_like(a, 1 / max(a.shape[-2:]))
        new = {path: jnp.zeros_like(leaf) if is_gamma(path, leaf) else first(leaf)
               for path, leaf in trees.items(trainable)}  # fmt: skip
        return trees.build(new), frozen

    change = functools.partial(dataclasses.replace, rival, family=VARIED)
    if kind == "gamma-fixed":
        count = size(jax.eval_shape(lambda: fixed(0)[0]))
        return change(name=f"{rival.name}, gamma fixed", start=fixed, parameters=count)
    if kind == "gamma-from-0":
        return change(name=f"{rival.name}, gamma from 0", start=swapped)
    # An update is about alpha times the square of what the steps move, so they meet in between.
    factor, rate = {"alpha-x10": (10, 3e-4), "alpha-x0.1": (0.1, 3e-3)}[kind]
    other = config.replace(randlora_alpha=factor * config.randlora_alpha)
    name = f"{rival.name}, alpha {other.randlora_alpha:g}"
    return dataclasses.replace(randlora(llama, params, other), family=VARIED, name=name, rate=rate)


def adapted(path):
    """Whether a path is that of a projection's kernel."""
    return path[-1] == "kernel" and path[-2] in PROJECTIONS


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
