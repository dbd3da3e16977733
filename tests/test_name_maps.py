"""Ready name maps, and one's own: there and back, and onto kernels of other shapes."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import randlora_jax as rl
from randlora_jax import peft, trees
from randlora_jax.peft.importing import from_peft
from randlora_jax.peft.tensors import Adapter
from tests.linen_cases import normal, randomised

D, HEADS, KV, H, F, EXPERTS, LAYERS = 6, 3, 1, 4, 10, 3, 2
HEADS_OF = {
    "q_proj": (D, HEADS, H), "k_proj": (D, KV, H), "v_proj": (D, KV, H), "o_proj": (HEADS, H, D),
}  # fmt: skip
ATTENTION = {n: (D, s[1] * H) if s[0] == D else (HEADS * H, D) for n, s in HEADS_OF.items()}
MLP = {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
# Name by name: the shape of torch's module, as (in, out).
DENSE = {
    f"model.layers.{i}.{part}.{name}": shape
    for i in range(LAYERS)
    for part, group in (("self_attn", ATTENTION), ("mlp", MLP))
    for name, shape in group.items()
}
MOE = {
    f"model.layers.{i}.mlp.experts.{e}.{name}": shape
    for i in range(LAYERS)
    for e in range(EXPERTS)
    for name, shape in MLP.items()
} | {f"model.layers.{i}.mlp.gate": (D, EXPERTS) for i in range(LAYERS)}
TUNIX = {
    f"layers.{i}.attn.{name}.w": HEADS_OF[name] for i in range(LAYERS) for name in ATTENTION
} | {f"layers.{i}.mlp.{name}.kernel": MLP[name] for i in range(LAYERS) for name in MLP}
TUNIX_MOE = {
    f"layers.{i}.mlp.{name}": (EXPERTS, *MLP[name]) for i in range(LAYERS) for name in MLP
} | {f"layers.{i}.mlp.router.kernel": (D, EXPERTS) for i in range(LAYERS)}
GEMMA = {
    f"layer_{i}.{name}": shape
    for i in range(LAYERS)
    for name, shape in (
        ("attn.q_einsum.w", (HEADS, D, H)),
        ("attn.attn_vec_einsum.w", (HEADS, H, D)),
        ("mlp.linear", (F, D)),
    )
}
GPT2 = {
    f"transformer.h.{i}.{name}": shape
    for i in range(LAYERS)
    for name, shape in (
        ("attn.c_attn", (D, 3 * D)),
        ("attn.c_proj", (D, D)),
        ("mlp.c_fc", (D, F)),
        ("mlp.c_proj", (F, D)),
    )
}
OF_GEMMA = {n: s for n, s in DENSE.items() if n.endswith(("q_proj", "o_proj", "down_proj"))}
# (the map, torch's modules, the shapes of the Flax tree)
CASES = {
    "llama onto tunix": (peft.tunix_name_map, DENSE, TUNIX),
    "a mixture of experts onto tunix": (peft.tunix_name_map, MOE, TUNIX_MOE),
    "gemma": (peft.gemma_name_map, OF_GEMMA, GEMMA),
    "gpt2": (peft.gpt2_name_map, GPT2, {f"{n}.kernel": shape[::-1] for n, shape in GPT2.items()}),
}


def params_of(shapes):
    return trees.build({tuple(n.split(".")): normal(0, *s) for n, s in shapes.items()})


def as_matrix(name, kernel):
    """A kernel of a Flax tree, or one expert's, as torch's module has it, (in, out)."""
    if "q_einsum" in name:
        return kernel.transpose(1, 0, 2).reshape(D, -1)
    if ".c_" in name:
        return kernel.T
    return kernel.reshape(D, -1) if kernel.shape[0] == D else kernel.reshape(-1, kernel.shape[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_updates_are_those_of_torch_s_modules(case, tmp_path):
    name_map, modules, shapes = CASES[case]
    # An adapter of torch's modules, by a model of which each is a plain kernel of its own.
    plain = {f"{name}.kernel": shape for name, shape in modules.items()}
    config = rl.RandLoraConfig(r=2, randlora_alpha=4, target_modules=sorted(modules))
    bases = rl.draw_bases(config, max(map(max, modules.values())), max(map(min, modules.values())))
    sizes = {n: (config.r, -(-min(s) // config.r), min(s)) for n, s in modules.items()}
    scales = {
        (*n.split("."), f"randlora_{k}"): normal(0, *shape)
        for n, (r, count, small) in sizes.items()
        for k, shape in (("lambda", (r, count)), ("gamma", (count, small)))
    }
    one = {
        "params": params_of(plain),
        "randlora": randomised(trees.build(scales)),
        "randlora_bases": bases,
    }
    peft.save_adapter(tmp_path / "theirs", one, config)
    updates = jax.tree.map(lambda a, b: np.asarray(a - b), rl.merge(one, config), one["params"])
    base = params_of(shapes)
    variables, loaded = peft.load_adapter(tmp_path / "theirs", {"params": base}, name_map)
    changed = rl.merge(variables, loaded)
    for name in modules:
        place = name_map(name)
        path, index = place if isinstance(place[1], int) else (place, None)
        where = (*path[:-1], path[-1].partition("[")[0]) if "[" in path[-1] else (*path, "kernel")
        update = np.asarray(trees.get(changed, where) - trees.get(base, where))
        update = update if index is None else update[index]
        np.testing.assert_allclose(
            as_matrix(".".join(where), update),
            trees.get(updates, tuple(name.split(".")))["kernel"],
            rtol=1e-4, atol=2e-5,
        )  # fmt: skip
    peft.save_adapter(tmp_path / "ours", variables, loaded, name_map)
    again, _ = peft.load_adapter(tmp_path / "ours", {"params": base}, name_map)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


PARTS = st.sampled_from(["a", "b", "mlp", "q_proj", "w[0]", "x_1"])
NAMES = st.lists(PARTS, min_size=1, max_size=3).map(".".join)


@given(
    head=NAMES, ours=NAMES, rest=NAMES, layer=st.integers(0, 99), expert=st.integers(0, 99),
    numbered=st.sampled_from(["{layer}", "_{layer}", None]), stacked=st.booleans(),
)  # fmt: skip
def test_a_map_leads_there_and_back(head, ours, rest, layer, expert, numbered, stacked):
    theirs = head + (f".{numbered}" if numbered else "") + (".experts.{}" if stacked else "")
    place = ours + (f".{numbered}" if numbered else "")
    name_map = peft.NameMap(((theirs, place),))
    filled = lambda text: text.replace("{layer}", str(layer)).replace("{}", str(expert))
    name = f"{filled(theirs)}.{rest}"
    expected = tuple(f"{filled(place)}.{rest}".split("."))
    found = name_map(name)
    assert found == ((expected, expert) if stacked else expected)
    assert name_map.inverse(expected, expert if stacked else None) == name
    assert name_map.inverse(expected, None if stacked else 1) is None


def test_longer_names_are_no_numbers_of_a_layer():
    name_map = peft.NameMap((("h.{}", "layers"),))
    assert name_map("h.12x.q") is None and name_map("h") is None and name_map("ah.1.q") is None


@pytest.mark.parametrize("to", ["model.language_model", "language_model.model"])
def test_a_language_model_within_another_model(to):
    inside = peft.llama_name_map.moved("model", to)
    for name in ("layers.3.mlp.up_proj", "embed_tokens", "norm"):
        place = peft.llama_name_map(f"model.{name}")
        place = place if isinstance(place[0], tuple) else (place, None)
        assert inside.inverse(*place) == f"{to}.{name}"
        assert inside(f"{to}.{name}") == peft.llama_name_map(f"model.{name}")
    assert inside("lm_head") == ("lm_head",)
    assert inside(f"{to}_other.norm") is inside("vision_tower.norm") is None
    for name_map, module in ((peft.llama_name_map, "mode"), (peft.gpt2_name_map, "transformer")):
        with pytest.raises(ValueError, match=f"no module '{module}' that could"):
            name_map.moved(module, to)
    name = f"{to}.layers.0.mlp.up_proj"
    for name_map in ({}, peft.llama_name_map):  # the second has a place for all of a "model"
        with pytest.raises(ValueError, match=rf"\.moved\('model', '{to}'\)"):
            from_peft(Adapter(rl.RandLoraConfig(), {name: (None, None)}, None, {}), name_map, {})
