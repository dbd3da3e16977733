"""Every process traces the same program: what is in a set must decide no order.

Processes that train together would else wait for each other in different places.
"""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import hashlib
import jax
from flax import nnx
import randlora_jax as rl
from randlora_jax import nnx as rx
from randlora_jax.linen import RandLora
from tests.expert_models import Moe, NnxRegistered, Registered
from tests.test_experts import X

config = rl.RandLoraConfig(r=3, target_modules="all-linear")
configs = {name: config for name in ("chat", "code", "math")}
texts = []
for base in (Registered(), Moe()):
    model = RandLora(base, configs)
    variables = model.adapt(base.init(jax.random.key(0), X), X)
    trainable, frozen = rl.split(variables, configs)
    loss = lambda t, f: (model.apply(rl.combine(t, f), X) ** 2).sum()
    texts.append(jax.jit(jax.grad(loss)).lower(trainable, frozen).as_text())
model = rx.inject(NnxRegistered(rngs=nnx.Rngs(0)), configs)
graphdef, state = nnx.split(model)
run = lambda state: (nnx.merge(graphdef, state)(X) ** 2).sum()
texts.append(jax.jit(run).lower(state).as_text())
print(hashlib.sha256("".join(texts).encode()).hexdigest())
"""


def test_the_program_does_not_depend_on_the_hashes_of_strings():
    seeds = "0", "1"
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True)
    environments = [{**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "."} for seed in seeds]
    command = [sys.executable, "-c", PROGRAM]
    runs = [subprocess.Popen(command, env=env, **options) for env in environments]
    printed = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0] * len(seeds)
    assert len(printed) == 1 and len(printed.pop()) == 64
