"""The bases that a seed gives are PEFT's own, bit for bit."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import randlora_jax as rl
from randlora_jax import peft as rl_peft
from randlora_jax.linen import RandLora
from randlora_jax.peft import torch_bases
from randlora_jax.peft.exporting import dense_bases
from tests.parity.peft_models import (
    MLP,
    MODES,
    TorchMLP,
    adapted,
    assert_close,
    params_of,
)


def test_bases_are_those_of_peft_on_50_random_configurations():
    rng = random.Random(0)
    for number in range(50):
        mode = MODES[list(MODES)[number % 3]]
        sides, r = (
            (rng.randint(1, 140), rng.randint(1, 140)),
            rng.choice([1, 2, 3, 4, 7, 8, 16, 32, 50]),
        )
        seed = rng.choice([rng.randrange(100), rng.randrange(2**63), -rng.randrange(1, 2**40)])
        options = {"r": r, "projection_prng_key": seed, "target_modules": ["0"], **mode}
        model = adapted(torch.nn.Sequential(torch.nn.Linear(*sides)), **options).base_model
        ours = torch_bases.draw(rl.RandLoraConfig(**options), max(sides), min(sides))
        for name, theirs in (("randlora_A", model.randlora_A), ("randlora_B", model.randlora_B)):
            theirs = theirs["default"].numpy()
            assert ours[name].dtype == theirs.dtype and ours[name].shape == theirs.shape
            assert ours[name].tobytes() == theirs.tobytes(), (options, sides, name)


@pytest.mark.parametrize("mode", MODES)
def test_large_bases_are_those_of_peft(mode):
    options = {"r": 32, "projection_prng_key": 3, "target_modules": ["0"], **MODES[mode]}
    model = adapted(torch.nn.Sequential(torch.nn.Linear(2048, 3072)), **options).base_model
    ours = torch_bases.draw(rl.RandLoraConfig(**options), 3072, 2048)
    assert ours["randlora_B"].tobytes() == model.randlora_B["default"].numpy().tobytes()


@pytest.mark.filterwarnings("ignore:Specified to not save basis_A")
def test_without_projections_the_redrawn_bases_give_the_same_outputs(tmp_path):
    torch.manual_seed(1)
    base, x = TorchMLP(), torch.randn(6, 10)
    params = params_of(base)
    model = adapted(base, target_modules=["lin0", "lin2"], save_projection=False)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="torch >= 2.12"):
        variables, config = rl_peft.load_adapter(tmp_path, {"params": params})
    assert_close(RandLora(MLP(), config).apply(variables, x.numpy()), model(x))
    for name in ("randlora_A", "randlora_B"):
        theirs = getattr(model.base_model, name)["default"].numpy()
        assert np.asarray(variables["randlora_bases"][name]).tobytes() == theirs.tobytes()


@pytest.mark.filterwarnings(
    "ignore:Specified to not", "ignore:the file has a seed", "ignore:Found missing"
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_redrawn_bases_are_rounded_as_peft_rounds_them_beside_such_a_base(tmp_path, mode, dtype):
    base, options = TorchMLP().to(dtype), {"save_projection": False, **MODES[mode]}
    adapted(base, target_modules=["lin0", "lin2"], **options).save_pretrained(tmp_path)
    kind = {torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}.get(dtype, jnp.float32)
    params = jax.tree.map(lambda a: a.astype(kind), params_of(TorchMLP()))
    variables, _ = rl_peft.load_adapter(tmp_path, {"params": params})
    ours = dense_bases(variables["randlora_bases"])
    theirs = peft.PeftModel.from_pretrained(TorchMLP().to(dtype), tmp_path)
    layer = theirs.base_model.model.lin0
    for name in ("randlora_A", "randlora_B"):
        expected = getattr(layer, name)["default"].float().numpy()
        assert ours[name].tobytes() == expected.tobytes()
