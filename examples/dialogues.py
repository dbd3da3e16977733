"""English questions and answers from the data of the PyPI package ``chatterbot-corpus``."""

import hashlib
import importlib.util
import pathlib
import re

import numpy as np
from gguf_weights import INSTALL, chat_prompt

HELD_OUT = 0.1  # share of the questions
LEFT_OUT_FILES = {"coding.yml"}  # its code has lost the list literals, so much of it is broken
LEFT_OUT_QUESTIONS = {"que veut dire hal", "bend over", "can you mate", "i hope that you die"}


def normalized(text):
    """The text without case, punctuation and spacing, so that near-duplicates are equal."""
    return " ".join(re.findall(r"\w+", text.lower()))


def pairs():
    """(train, held_out): lists of (question, answer); no question is in both."""
    parts = by_topic().values()
    return tuple([pair for part in parts for pair in part[which]] for which in (0, 1))


def by_topic():
    """{topic: (train, held_out)}, of which `pairs` are all."""
    for package in ("yaml", "chatterbot_corpus"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the package {package} is missing: {INSTALL}")
    import yaml

    root = pathlib.Path(importlib.util.find_spec("chatterbot_corpus").origin).parent
    files = sorted((root / "data" / "english").glob("*.yml"))
    if not files:
        raise FileNotFoundError(f"no dialogues under {root}/data/english: {INSTALL}")
    topics, seen = {}, set()
    for file in files:
        if file.name in LEFT_OUT_FILES:
            continue
        train, held_out = topics[file.stem] = [], []
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            question, answer = (" ".join(str(turn).split()) for turn in turns[:2])
            key = (normalized(question), normalized(answer))
            # Shouted questions are stubs; of one or two letters, answers are remains of others.
            broken = question.isupper() or (len(answer) < 3 and not answer.isdigit())
            if broken or key in seen or key[0] == key[1] or key[0] in LEFT_OUT_QUESTIONS:
                continue
            seen.add(key)
            (held_out if share(question) < HELD_OUT else train).append((question, answer))
    return topics


def share(question):
    """A number in [0, 1) that is the question's own: by it, pairs are divided."""
    digest = hashlib.sha256(normalized(question).encode()).hexdigest()
    return int(digest[:8], 16) / 2**32


def with_validation():
    """(train, validation, held_out): as `pairs`, with as large a part of train to tune on."""
    train, held_out = pairs()
    chosen = [share(question) < 2 * HELD_OUT for question, _ in train]
    parts = [[pair for pair, c in zip(train, chosen, strict=True) if c is which]
             for which in (False, True)]  # fmt: skip
    return *parts, held_out


def encode(pairs, tokenizer, seq_len):
    """{"tokens", "targets": int32 (N, L), "mask": float32 (N, L)} of N pairs, cut to L.

    Target t is token t + 1; the mask is 1 where the target is of the answer or its <|im_end|>.
    """
    end = tokenizer.token_to_id("<|im_end|>")
    ids = np.full((len(pairs), seq_len + 1), end, np.int32)
    mask = np.zeros((len(pairs), seq_len + 1), np.float32)
    for row, (question, answer) in enumerate(pairs):
        prompt = tokenizer.encode(chat_prompt(question)).ids
        full = (prompt + tokenizer.encode(answer).ids + [end])[: seq_len + 1]
        ids[row, : len(full)] = full
        mask[row, len(prompt) : len(full)] = 1
    return {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": mask[:, 1:]}


def check_length(pairs, tokenizer, seq_len):
    """Raises a ValueError where prompts fill the sequences, and nothing is left to learn from."""
    cut = int((encode(pairs, tokenizer, seq_len)["mask"].sum(1) == 0).sum())
    if cut > len(pairs) // 10:
        raise ValueError(
            f"--seq-len {seq_len} cuts the answers of {cut} of {len(pairs)} pairs off: give more"
        )


def batches(pairs, tokenizer, batch_size, seq_len, seed, start=0):
    """Endless training batches of `encode`, (B, L) each, from number `start` on.

    Each pass over the pairs has an order of its own. Batch i depends on i and the seed alone,
    so a run that is resumed with start=i sees what it would have seen.
    """
    data = encode(pairs, tokenizer, seq_len)
    index, epoch, order = start * batch_size, -1, None
    while True:
        rows = []
        while len(rows) < batch_size:
            if index // len(pairs) != epoch:
                epoch = index // len(pairs)
                order = np.random.default_rng([seed, epoch]).permutation(len(pairs))
            rows.append(order[index % len(pairs)])
            index += 1
        yield {name: values[rows] for name, values in data.items()}


def held_out_batches(pairs, tokenizer, batch_size, seq_len):
    """All pairs once, in order, as a list of batches (B, L); rows that fill the last are masked."""
    data = encode(pairs, tokenizer, seq_len)
    fill = ((0, -len(pairs) % batch_size), (0, 0))
    data = {name: np.pad(values, fill) for name, values in data.items()}
    starts = range(0, len(data["tokens"]), batch_size)
    return [{name: v[i : i + batch_size] for name, v in data.items()} for i in starts]
