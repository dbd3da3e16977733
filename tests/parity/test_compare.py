"""The comparison of methods, with a tiny Llama: it compares what it says, and goes on."""

import dataclasses
import json

import compare_smollm2
import dialogues
import gguf_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rivals
import smollm2
import spectra
import study
from hypothesis import given
from hypothesis import strategies as st

import randlora_jax as rl
from randlora_jax import trees
from tests.parity.tiny_finetune import REPLACED, SIZES, load

SMALL = ["--lora-ranks", "1", "--steps", "4", "--batch-size", "4", "--seeds", "2"]


@pytest.fixture
def few(monkeypatch):
    pairs = dialogues.pairs
    for module, name, value in REPLACED[:2]:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(dialogues, "pairs", lambda: tuple(part[::16] for part in pairs()))
    tuned = study.Study.tuned  # weights that are random want larger rates than a model's
    larger = lambda self, rival, *a, **kw: tuned(
        self, dataclasses.replace(rival, rate=0.1), *a, **kw
    )
    monkeypatch.setattr(study.Study, "tuned", larger)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def everyone():
    llama, params = smollm2.Llama(SIZES), load()[1]
    return llama, params, compare_smollm2.contestants(llama, params, [1, 3], rivals.VARIANTS)


def test_the_budgets_are_equal_and_never_in_favour_of_ours():
    _, _, found = everyone()
    full, *others = found
    assert full.parameters == rivals.size(load()[1])
    assert [r.family for r in others] == [rivals.LORA, rivals.RANDLORA] * 2 + [rivals.VARIED] * 4
    for lora, ours in zip(others[:4:2], others[1:4:2], strict=True):
        assert 0.6 * lora.parameters < ours.parameters <= lora.parameters
    assert len({rival.name for rival in found}) == len(found)


def nudged(array):
    noise = np.random.default_rng(array.size).normal(size=array.shape)
    return array + 0.01 * noise.astype(np.float32)


def test_updates_are_what_the_base_with_them_computes():
    llama, params, found = everyone()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (2, 9)), jnp.int32)
    base = llama.apply({"params": params}, tokens)
    for rival in found:
        trainable, frozen = rival.start(1)
        assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == rival.parameters
        np.testing.assert_allclose(rival.apply(trainable, frozen, tokens), base, atol=1e-6)
        assert all(not np.any(u) for u in rival.updates(trainable, frozen).values())
        noise = np.random.default_rng(2).normal
        moved = jax.tree.map(
            lambda a, noise=noise: a + 0.01 * noise(size=a.shape).astype("f4"), trainable
        )
        updates = rival.updates(moved, frozen)
        assert {path[-2] for path in updates} == set(smollm2.PROJECTIONS)
        merged = trees.build({p: leaf + updates.get(p, 0) for p, leaf in trees.items(params)})
        rest = moved if rival.family == rivals.FULL else params
        rest = {p: leaf for p, leaf in trees.items(rest) if p not in updates}
        merged = trees.union(merged, trees.build(rest))
        ours = rival.apply(moved, frozen, tokens)
        assert float(jnp.abs(ours - base).max()) > 1e-3, rival.name
        np.testing.assert_allclose(llama.apply({"params": merged}, tokens), ours, atol=2e-5)


def test_seeds_give_other_bases_and_factors():
    _, _, found = everyone()
    for rival in found[1:]:
        one, same, other = (rl.combine(*rival.start(seed)) for seed in (0, 0, 1))
        equal = lambda a, b: jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))
        assert equal(one, same) and not equal(one, other)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_singular_values_are_numpy_s(rows, columns, seed):
    matrix = np.random.default_rng(seed).normal(size=(rows, columns))
    expected = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(spectra.singular_values(matrix), expected, atol=1e-6 * expected[0])


def test_effective_rank_counts_equal_values_and_little_of_small_ones():
    assert spectra.effective_rank(np.zeros(5)) == 0
    for k in (1, 3, 7):
        assert spectra.effective_rank([2.0] * k + [0.0] * 4) == pytest.approx(k)
    assert 2 < spectra.effective_rank([1, 1, 0.01]) < 2.1


def test_no_question_is_in_two_parts():
    parts = dialogues.with_validation()
    questions = [{dialogues.normalized(question) for question, _ in part} for part in parts]
    assert not questions[0] & questions[1] and not questions[1] & questions[2]
    assert parts[2] == dialogues.pairs()[1] and len(parts[0]) > 500 and len(parts[1]) > 40
    assert sorted(parts[0] + parts[1]) == sorted(dialogues.pairs()[0])


def test_it_tunes_goes_on_and_shows(few, tmp_path, monkeypatch, capsys):
    train, done = study.Study.train, []

    def interrupted(self, trainer, rate, seed):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append((trainer.rival.name, rate, seed))
        return train(self, trainer, rate, seed)

    monkeypatch.setattr(study.Study, "train", interrupted)
    argv = [*SMALL, "--output-dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        compare_smollm2.main(argv)
    before = done.copy()
    assert len(list(tmp_path.glob("runs/*.json"))) == len(before) == 4
    done[:] = [None]  # three more, and then all
    with pytest.raises(KeyboardInterrupt):
        compare_smollm2.main(argv)
    assert not set(before) & set(done)
    monkeypatch.setattr(study.Study, "train", train)
    compare_smollm2.main(argv)
    text = capsys.readouterr().out
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*.json")]
    for name in ("full fine-tuning", "LoRA k=1", "RandLoRA r="):
        mine = [run for run in runs if run["name"].startswith(name)]
        tuned = {run["rate"]: run for run in mine if run["seed"] == 0}
        best = min(tuned, key=lambda rate: tuned[rate]["validation"])
        assert min(tuned) < best < max(tuned)  # not at an end
        seeds = [run for run in mine if run["rate"] == best]
        assert sorted(run["seed"] for run in seeds) == [0, 1]
        losses = [run["held_out"][-1][1] for run in seeds]
        assert f"{np.mean(losses):.3f} ± {np.std(losses, ddof=1):.3f}" in text
    assert all((tmp_path / f"{name}.png").stat().st_size for name in ("comparison", "spectra"))
    with pytest.raises(ValueError, match="runs with steps=4: give another --output-dir"):
        compare_smollm2.main([*argv, "--steps", "5"])


def test_a_rate_that_is_too_large_does_not_end_the_comparison(few, tmp_path):
    llama, params = smollm2.Llama(SIZES), load()[1]
    tokenizer = gguf_weights.tokenizer()
    train, *tests = dialogues.with_validation()
    tests = [dialogues.held_out_batches(part, tokenizer, 8, 56) for part in tests]
    data = dict(zip(("train", "validation", "held_out"), (train, *tests), strict=True))
    settings = study.Settings(3, 4, 56, 5, SIZES.layers, "a device")
    kept = study.Study(tmp_path, settings, tokenizer, data)
    rival = rivals.full(llama, params)
    broken = dataclasses.replace(rival, apply=lambda *a: rival.apply(*a) / 0)
    tuning, seeds = kept.tuned(broken, 1)
    untuned, _ = kept.tuned(broken, 1, tune=False)
    assert [run["rate"] for run in untuned] == [tuning[1]["rate"]]
    assert all(np.isnan(run["validation"]) and run["ranks"][-1][1] == 0 for run in tuning)
    assert len(seeds) == 1 and seeds[0] in tuning
