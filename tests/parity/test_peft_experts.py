"""Experts that Flax keeps in one kernel and torch in modules of their own, to PEFT and back."""

import flax.linen as nn
import jax
import numpy as np
import torch

import randlora_jax as rl
from randlora_jax import peft as rl_peft
from randlora_jax.linen import RandLora
from tests.expert_models import EXPERTS, D, F, Raw
from tests.linen_cases import normal
from tests.parity.peft_models import NO_COPIES, adapted, assert_close, load_in_peft
from tests.peft_adapters import same_trees

X = normal(0, EXPERTS, 5, D)
EQUATIONS = {"moe.gate": "ecd,edf->ecf", "moe.out": "ecf,efd->ecd"}
NAMES = {
    f"experts.{i}.{name}": (("moe", f"{name}[0;1]"), i)
    for i in range(EXPERTS)
    for name in ("gate", "out")
}


class TorchExperts(torch.nn.Module):
    """Each expert a module, as Mixtral's in transformers 4."""

    def __init__(self):
        super().__init__()
        linear = lambda ins, outs: torch.nn.Linear(ins, outs, bias=False)
        self.experts = torch.nn.ModuleList(
            torch.nn.ModuleDict({"gate": linear(D, F), "out": linear(F, D)}) for _ in range(EXPERTS)
        )

    def forward(self, x):
        gelu = torch.nn.GELU(approximate="tanh")
        return torch.stack([e["out"](gelu(e["gate"](x[i]))) for i, e in enumerate(self.experts)])


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Raw(name="moe")(x)


def test_experts_go_there_and_back(tmp_path):
    torch.manual_seed(0)
    base = TorchExperts()
    stacked = lambda n: np.stack([e[n].weight.detach().numpy().T.copy() for e in base.experts])
    params = {"moe": {name: stacked(name) for name in ("gate", "out")}}
    model = adapted(base, r=3, randlora_alpha=6, target_modules=["gate", "out"])
    with torch.no_grad():
        expected = model(torch.from_numpy(np.array(X)))
    model.save_pretrained(tmp_path / "theirs")
    params = jax.tree.map(jax.numpy.asarray, params)
    variables, config = rl_peft.load_adapter(tmp_path / "theirs", {"params": params}, NAMES)
    assert variables["randlora"]["moe"]["gate[0;1]"]["randlora_lambda"].shape == (EXPERTS, 3, 2)
    assert_close(RandLora(Experts(), config).apply(variables, X), expected)
    assert_close(Experts().apply({"params": rl.merge(variables, config)}, X), expected)
    rl_peft.save_adapter(tmp_path / "ours", variables, config, NAMES)
    again, _ = rl_peft.load_adapter(tmp_path / "ours", {"params": params}, NAMES)
    assert same_trees(again, variables)
    torch.manual_seed(0)
    with torch.no_grad():
        loaded = load_in_peft(TorchExperts(), tmp_path / "ours", (NO_COPIES,))
        assert torch.equal(loaded(torch.from_numpy(np.array(X))), expected)
