"""SmolLM2, a Llama, in Flax Linen, and greedy generation with it.

Shapes: B batch, T tokens in this call, S keys (T, or the cache's length), H query heads,
K key/value heads, D size of a head.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; the defaults are those of SmolLM2-135M."""

    vocab_size: int = 49152
    hidden_size: int = 576
    ffn_size: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    rope_theta: float = 100000.0
    norm_eps: float = 1e-5
    max_length: int = 8192
    tied_embeddings: bool = True

    @property
    def head_size(self):
        return self.hidden_size // self.heads


def first_layers(config, params, count):
    """(config, params) of the model that has the first layers alone."""
    few = jax.tree.map(lambda a: a[:count], params["layers"])
    return dataclasses.replace(config, layers=min(count, config.layers)), {**params, "layers": few}


def rotate(x, cos, sin):
    """Rotary position embedding of x (B, T, H, D) by cos, sin (B, T, 1, D/2), in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Layer(nn.Module):
    """What the parts of the model share."""

    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def part(self, kind, *args, **kwargs):
        return kind(*args, **kwargs, dtype=self.dtype, param_dtype=self.param_dtype)

    def dense(self, features, name):
        return self.part(nn.Dense, features, use_bias=False, name=name)

    def norm(self, x, name):
        kinds = dict(dtype=jnp.float32, param_dtype=self.param_dtype)
        norm = nn.RMSNorm(epsilon=self.config.norm_eps, **kinds, name=name)
        return norm(x.astype(jnp.float32)).astype(self.dtype)


BLOCK = (
    128  # rows of scores at once: they stay in a cache, and keys behind all of them are left out
)


class Attention(Layer):
    """Grouped-query attention: (B, T, hidden) and a cache (or None) -> the same."""

    @nn.compact
    def __call__(self, x, cache, positions, rope):
        c, (b, t, _) = self.config, x.shape
        q = self.dense(c.heads * c.head_size, "q_proj")(x).reshape(b, t, c.heads, -1)
        k = self.dense(c.kv_heads * c.head_size, "k_proj")(x).reshape(b, t, c.kv_heads, -1)
        v = self.dense(c.kv_heads * c.head_size, "v_proj")(x).reshape(b, t, c.kv_heads, -1)
        q, k, key_positions = rotate(q, *rope), rotate(k, *rope), positions
        if cache is not None:
            put = lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, 0)
            k, v = (
                jax.vmap(put)(old, new, positions[:, 0])
                for old, new in zip(cache, (k, v), strict=True)
            )
            key_positions = jnp.arange(k.shape[1], dtype=positions.dtype)[None]
            cache = (k, v)

        q = q.reshape(b, t, c.kv_heads, c.heads // c.kv_heads, c.head_size)
        out = []
        for start in range(0, t, BLOCK):
            rows, seen = (
                slice(start, start + BLOCK),
                slice(start + BLOCK if cache is None else None),
            )
            scores = jnp.einsum(
                "btkgd,bskd->bkgts", q[:, rows], k[:, seen], preferred_element_type=jnp.float32
            )
            visible = positions[:, rows, None] >= key_positions[:, None, seen]
            scores = jnp.where(visible[:, None, None], scores * c.head_size**-0.5, -1e30)
            weights = nn.softmax(scores, axis=-1).astype(self.dtype)
            out.append(jnp.einsum("bkgts,bskd->btkgd", weights, v[:, seen]))
        out = jnp.concatenate(out, axis=1).reshape(b, t, -1)
        return self.dense(c.hidden_size, "o_proj")(out), cache


class MLP(Layer):
    """SwiGLU feed-forward: (B, T, hidden) -> (B, T, hidden)."""

    @nn.compact
    def __call__(self, x):
        gate = nn.silu(self.dense(self.config.ffn_size, "gate_proj")(x))
        up = self.dense(self.config.ffn_size, "up_proj")(x)
        return self.dense(self.config.hidden_size, "down_proj")(gate * up)


class Block(Layer):
    """One layer: (B, T, hidden) and a cache (or None) -> the same."""

    @nn.compact
    def __call__(self, x, cache, positions, rope):
        attention = self.part(Attention, self.config, name="self_attn")
        attended, cache = attention(self.norm(x, "input_layernorm"), cache, positions, rope)
        x = x + attended
        mlp = self.part(MLP, self.config, name="mlp")
        return x + mlp(self.norm(x, "post_attention_layernorm")), cache


class Llama(Layer):
    """Llama language model.

    ``model(tokens)``: int32 (B, T) -> float32 logits (B, T, vocab), causal; pad on the right.
    ``model(tokens, cache_length=S)``: the same, and starts a cache -> (logits, cache).
    ``model(tokens, positions, cache)``: goes on from a cache -> (logits, cache); positions,
    int32 (B, T), are consecutive in each row. A cache is a pair of (layers, B, S, K, D).
    """

    @nn.compact
    def __call__(self, tokens, positions=None, cache=None, cache_length=None):
        c, (b, t) = self.config, tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
        if cache_length is not None:
            shape = (c.layers, b, cache_length, c.kv_heads, c.head_size)
            cache = (jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        exponents = jnp.arange(0, c.head_size, 2, dtype=jnp.float32) / c.head_size
        angles = positions.astype(jnp.float32)[..., None] * (c.rope_theta**-exponents)[None, None]
        rope = (jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None])

        embed = self.part(nn.Embed, c.vocab_size, c.hidden_size, name="embed_tokens")
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),  # scan already keeps the two passes apart
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.layers,
        )
        x, cache = self.part(layers, c, name="layers")(embed(tokens), cache, positions, rope)
        x = self.norm(x, "norm")
        logits = embed.attend(x) if c.tied_embeddings else self.dense(c.vocab_size, "lm_head")(x)
        logits = logits.astype(jnp.float32)
        return logits if cache is None else (logits, cache)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _decode(apply_fn, variables, tokens, lengths, limits, eos, size, options):
    """Greedy decoding of tokens (B, P), of which `lengths` (B,) count, up to index `limits` (B,).

    Returns the ids (B, size): the prompts, what follows them, and eos from there on.
    """
    rows = jnp.arange(tokens.shape[0])
    logits, cache = apply_fn(variables, tokens, cache_length=size, **options)
    ids = jnp.full((tokens.shape[0], size), eos).at[:, : tokens.shape[1]].set(tokens)

    def unfinished(last, ids):
        return (last < limits) & (ids[rows, last] != eos)

    def step(state):
        # What padding left in the cache lies ahead of `last`: it is overwritten before it is seen.
        last, ids, cache = state
        going, newest = unfinished(last, ids), ids[rows, last][:, None]
        logits, cache = apply_fn(variables, newest, last[:, None], cache, **options)
        chosen = jnp.argmax(logits[:, 0], -1).astype(jnp.int32)
        at = last + going.astype(last.dtype)
        return at, ids.at[rows, at].set(jnp.where(going, chosen, ids[rows, at])), cache

    ids = ids.at[rows, lengths].set(jnp.argmax(logits[rows, lengths - 1], -1).astype(jnp.int32))
    going = lambda state: jnp.any(unfinished(*state[:2]))
    return jax.lax.while_loop(going, step, (lengths, ids, cache))[1]


def generate_all(apply_fn, variables, prompts, max_new_tokens, eos, **options):
    """Greedy continuations of lists of ids, in one batch: lists of new ids, without eos.

    apply_fn is `model.apply`, or that of a wrapper around the model, whose keywords the options
    are. Lengths are rounded up, so that prompts of about the same length share one compilation.
    """
    if not prompts or not all(prompts) or max_new_tokens < 1:
        raise ValueError("generate needs at least one prompt token and max_new_tokens >= 1")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = -(-int(lengths.max()) // 64) * 64
    tokens = np.full((len(prompts), padded), eos, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    ends = lengths + np.int32(max_new_tokens)
    size = padded + -(-max_new_tokens // 64) * 64
    numbers = lengths, ends - 1, np.int32(eos)
    ids = np.asarray(_decode(apply_fn, variables, tokens, *numbers, size, options))
    new = [row[length:end].tolist() for row, length, end in zip(ids, lengths, ends, strict=True)]
    return [list(itertools.takewhile(lambda i: i != eos, row)) for row in new]


def generate(apply_fn, variables, prompt_tokens, max_new_tokens, eos):
    """`generate_all` of one prompt."""
    return generate_all(apply_fn, variables, [prompt_tokens], max_new_tokens, eos)[0]
