"""Bases redrawn as torch draws them, against hashes that PEFT's own bases gave."""

import hashlib
import json
import pathlib
import time

import ml_dtypes
import numpy as np
import pytest

from randlora_jax import RandLoraConfig
from randlora_jax.peft import torch_bases

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "torch_bases.json").read_text())
PUBLISHED = json.loads((GOLDEN / "published.json").read_text())
MODES = ("dense", "sparse", "very_sparse")


def draw(mode, max_dim, min_dim, r, seed):
    mode = {mode: True} if mode != "dense" else {}
    return torch_bases.draw(RandLoraConfig(r=r, projection_prng_key=seed, **mode), max_dim, min_dim)


def sha256(array):
    return hashlib.sha256(array.astype("<f4").tobytes()).hexdigest()


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['mode']}-{c['max_dim']}x{c['min_dim']}-r{c['r']}"
)
def test_bits_are_those_that_peft_drew(case):
    bases = draw(
        case["mode"], case["max_dim"], case["min_dim"], case["r"], case["projection_prng_key"]
    )
    assert sha256(bases["randlora_A"]) == case["A"]
    assert sha256(bases["randlora_B"]) == case["B"]


@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_that_were_published(mode):
    bases = draw(mode, 10, 6, 4, 0)
    assert sha256(bases["randlora_A"])[:16] == PUBLISHED[mode]["A_hash"]
    assert sha256(bases["randlora_B"])[:16] == PUBLISHED[mode]["B_hash"]


@pytest.mark.parametrize("seed", [5 + 2**32, 5 - 2**34, 5 + 2**70])
def test_only_the_low_32_bits_of_a_seed_count(seed):
    one, other = draw("dense", 21, 13, 5, 5), draw("dense", 21, 13, 5, seed)
    np.testing.assert_array_equal(one["randlora_B"], other["randlora_B"])


@pytest.mark.parametrize("mode", MODES)
def test_shapes_and_dtypes(mode):
    bases = draw(mode, 31, 17, 4, 1)
    assert bases["randlora_A"].shape == (4, 1, 17)
    assert bases["randlora_B"].shape == (31, 5, 4)
    assert {array.dtype for array in bases.values()} == {np.dtype(np.float32)}


def test_dense_values_are_bfloat16_numbers():
    for array in draw("dense", 64, 33, 7, 11).values():
        np.testing.assert_array_equal(array, array.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("mode", ["sparse", "very_sparse"])
def test_ternary_values_have_one_size(mode):
    for array in draw(mode, 64, 33, 7, 11).values():
        assert len(np.unique(np.abs(array[array != 0]))) == 1


@pytest.mark.parametrize("block", [1, 1000])
def test_the_size_of_blocks_changes_nothing(monkeypatch, block):
    whole = draw("dense", 64, 33, 7, 11), draw("sparse", 64, 33, 7, 11)
    monkeypatch.setattr(torch_bases, "_BLOCK", block)
    for before, mode in zip(whole, ("dense", "sparse"), strict=True):
        for name, array in draw(mode, 64, 33, 7, 11).items():
            np.testing.assert_array_equal(array, before[name])


def test_bases_of_llama_3_2_3b_take_seconds():
    start = time.perf_counter()
    bases = draw("dense", 3072, 3072, 32, 0)
    assert bases["randlora_B"].size == 3072 * 96 * 32
    assert time.perf_counter() - start < 20
