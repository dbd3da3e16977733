"""What we export, in all of PEFT's and transformers' ways to load it, and what PEFT adds to files.

With the real loaders, on a small Llama.
"""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import randlora_jax as rl
from randlora_jax import peft as rl_peft
from randlora_jax import trees
from tests.parity.peft_models import NO_COPIES, load_in_peft
from tests.peft_adapters import same_trees

TOKENS = torch.arange(6)[None]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama(tied=False):
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(sizes)


def place_of(name):
    """Of a torch weight, ((its path in a Flax tree, layer), how it lies there)."""
    found = rl_peft.llama_name_map(name.removesuffix(".weight"))
    path, layer = found if isinstance(found[-1], int) else (found, None)
    leaf = "scale" if "norm" in name else "embedding" if "embed" in name else "kernel"
    return ((*path, leaf), layer), leaf == "kernel"


def params_of(model):
    """The parameters for a Flax model with `nn.scan`."""
    tied, leaves = model.config.tie_word_embeddings, {}
    for name, weight in model.state_dict().items():
        (path, _), turned = place_of(name)
        if not (tied and "lm_head" in name):
            leaves.setdefault(path, []).append((weight.T if turned else weight).numpy())
    stacked = lambda path, parts: np.stack(parts) if path[0] == "layers" else parts[0]
    return trees.build({path: jnp.asarray(stacked(path, parts)) for path, parts in leaves.items()})


def of_ours(params, dtype=jnp.float32):
    """(variables, config) of an adapter with bases of jax's, its scales moved from their start."""
    config = rl.RandLoraConfig(r=4, randlora_alpha=8, target_modules=TARGETS)
    key = iter(jax.random.split(jax.random.key(0), 99))
    normal = lambda *shape: 0.3 * jax.random.normal(next(key), shape)
    scales = {}
    for path, leaf in trees.items(params):
        if len(path) > 2 and path[-2] in TARGETS:
            n = -(-min(leaf.shape[-2:]) // 4)
            scales[(*path[:-1], "randlora_lambda")] = normal(2, 4, n)
            scales[(*path[:-1], "randlora_gamma")] = normal(2, n, min(leaf.shape[-2:]))
    bases = rl.draw_bases(config, 24, 16)
    return {"params": params, "randlora": trees.build(scales), "randlora_bases": bases}, config


def assert_merged(theirs, variables, config):
    """PEFT's merged weights are ours, each of them."""
    merged = dict(trees.items(rl.merge(variables, config)))
    for name, weight in theirs.merge_and_unload().state_dict().items():
        if theirs.config.tie_word_embeddings and "lm_head" in name:
            continue
        (path, layer), turned = place_of(name)
        ours = np.asarray(merged[path] if layer is None else merged[path][layer])
        np.testing.assert_allclose(ours.T if turned else ours, weight.numpy(), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(torch base, variables, config, folder with one adapter in both layouts)."""
    base, folder = llama(), tmp_path_factory.mktemp("exported")
    variables, config = of_ours(params_of(base))
    for layout in ("shared", "copies"):
        rl_peft.save_adapter(
            folder / layout, variables, config, rl_peft.llama_name_map, layout=layout
        )
    return base, variables, config, folder


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_one_pair_of_bases_loads_to_the_same_bits_as_its_copies(exported, dtype, low):
    base, _, _, folder = exported
    options = {"low_cpu_mem_usage": low}
    new = lambda: copy.deepcopy(base).to(dtype)
    copies = load_in_peft(new(), folder / "copies", **options)
    shared = load_in_peft(new(), folder / "shared", (NO_COPIES,), **options)
    assert torch.equal(logits(shared), logits(copies))
    assert not torch.equal(logits(shared), logits(new()))
    second = load_in_peft(new(), folder / "copies", **options)
    second.load_adapter(folder / "shared", "second", **options)
    second.set_adapter("second")
    assert torch.equal(logits(second), logits(copies))


def test_it_is_the_update_of_ours_and_trains_on_in_torch(exported, tmp_path):
    base, variables, config, folder = exported
    new = lambda: copy.deepcopy(base)
    assert_merged(load_in_peft(new(), folder / "shared", (NO_COPIES,)), variables, config)
    model = load_in_peft(new(), folder / "shared", (NO_COPIES,), is_trainable=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "theirs")
    params = {"params": variables["params"]}
    back, its_config = rl_peft.load_adapter(tmp_path / "theirs", params, rl_peft.llama_name_map)
    assert same_trees(back["randlora_bases"], variables["randlora_bases"])
    assert_merged(load_in_peft(new(), tmp_path / "theirs"), back, its_config)


def test_transformers_own_loader_needs_the_copies(exported):
    """As `save_adapter` says; it tells of what is missing in a table, and draws other bases."""
    base, _, _, folder = exported
    expected = logits(load_in_peft(copy.deepcopy(base), folder / "copies"))
    for layout, same in (("copies", True), ("shared", False)):
        model = copy.deepcopy(base)
        model.load_adapter(folder / layout)
        assert torch.equal(logits(model), expected) is same


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
def test_beside_an_adapter_of_torch_s_bases_it_wants_memory_of_its_own(exported, tmp_path, low):
    """As README says: else PEFT copies the bases that come second over those of the first."""
    base, _, _, folder = exported
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.RandLoraConfig(r=4, target_modules=TARGETS, init_weights=False)
    )
    theirs.save_pretrained(tmp_path)
    expected = logits(load_in_peft(copy.deepcopy(base), tmp_path))
    both = load_in_peft(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
    both.load_adapter(folder / "shared", "ours", low_cpu_mem_usage=low)
    assert torch.equal(logits(both), expected) is low
    both.set_adapter("ours")
    ours = load_in_peft(copy.deepcopy(base), folder / "copies")
    assert torch.equal(logits(both), logits(ours))


CASES = {
    "an adapted head": ({"target_modules": ["q_proj", "lm_head"]}, "auto"),
    "embeddings": ({"target_modules": ["q_proj"]}, True),
    "both": ({"target_modules": ["q_proj", "lm_head"]}, True),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("options, embeddings", CASES.values(), ids=CASES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_of_the_base_that_peft_saves_too(tmp_path, options, embeddings, tied):
    base = llama(tied)
    params = {"params": params_of(base)}
    if tied:  # a Flax model that shares the embedding has no kernel to adapt
        options = {"target_modules": ["q_proj"]}
        embeddings = True
    config = peft.RandLoraConfig(r=4, randlora_alpha=8, **options)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    saved = [k for k in load_file(tmp_path / "adapter_model.safetensors") if "weight" in k]
    assert saved
    with pytest.warns(UserWarning, match="equal to those here: passed over"):
        variables, config = rl_peft.load_adapter(tmp_path, params, rl_peft.llama_name_map)
    assert same_trees(variables["params"], params["params"])
    assert_merged(model, variables, config)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_that_were_changed_in_torch(tmp_path, tied):
    base = llama(tied)
    params = {"params": params_of(base)}
    with torch.no_grad():
        base.model.embed_tokens.weight.add_(1)
    model = peft.get_peft_model(base, peft.RandLoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.warns(UserWarning, match=r"modules_to_save=\['embed_tokens'\]"):
        variables, config = rl_peft.load_adapter(tmp_path, params, rl_peft.llama_name_map)
    assert_merged(model, variables, config)


def test_a_copy_of_a_shared_embedding_is_told(tmp_path):
    base = llama(tied=True)
    params = {"params": params_of(base)}
    config = peft.RandLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own word on it
        model = peft.get_peft_model(base, config)
        model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'embed_tokens.embedding' is trained, and no output"):
        rl_peft.load_adapter(tmp_path, params, rl_peft.llama_name_map)


def test_a_whole_state_dict(exported, tmp_path):
    """What `torch.save(model.state_dict())` holds, as some training loops write it."""
    base, variables, _, folder = exported
    model = load_in_peft(copy.deepcopy(base), folder / "copies")
    state = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(tmp_path)
    params = {"params": variables["params"]}
    with pytest.warns(UserWarning, match="and 18 more, equal to those here: passed over"):
        loaded, _ = rl_peft.load_adapter(tmp_path, params, rl_peft.llama_name_map)
    assert same_trees(loaded, variables)
