"""The public surface as the type checkers see it, in the code of a user."""

import pathlib
import re
import shutil

import pytest

from tests import test_readme
from tests.typing import checkers

SNIPPETS = pathlib.Path(__file__).parent / "snippets"
# Libraries without types of their own: mypy says so of each import, and takes them for Any.
UNTYPED = re.compile(r'Skipping analyzing "(optax|orbax)\b')


@pytest.fixture
def folder(tmp_path):
    """What both checkers read: a user's modules, and no configuration."""
    scripts = {"linen": [], "nnx": []}
    for heading, code in test_readme.blocks():
        if heading == test_readme.TUNIX:
            continue  # which is not installed here
        scripts["nnx" if test_readme.is_of_nnx(code) else "linen"].append(code)
    assert min(len(parts) for parts in scripts.values()) > 1
    for name, parts in scripts.items():
        names = (SNIPPETS / f"{name}_names.py").read_text()
        (tmp_path / f"readme_{name}.py").write_text("\n".join([names, *parts]))
    for name in ("right.py", "wrong.py"):
        shutil.copy(SNIPPETS / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("checker", [checkers.mypy, checkers.pyright], ids=lambda c: c.__name__)
def test_right_code_passes_and_mistakes_are_named(checker, folder):
    reports = [report for report in checker(folder) if not UNTYPED.match(report.message)]
    lines = (SNIPPETS / "wrong.py").read_text().splitlines()
    marks = {n: mark[1] for n, s in enumerate(lines, 1) if (mark := re.search("# wrong: (.*)", s))}
    assert len(marks) > 50
    named = {n for n, mark in marks.items() if any(_names(r, n, mark) for r in reports)}
    assert [r for r in reports if r.file != "wrong.py" or r.line not in marks] == []
    assert [lines[n - 1].strip() for n in sorted(set(marks) - named)] == []


def _names(report, line, mark):
    word = rf"(?<!\w){re.escape(mark)}(?!\w)"
    return (report.file, report.line) == ("wrong.py", line) and re.search(word, report.message)


def test_every_public_symbol_has_a_known_type(tmp_path):
    found = checkers.completeness(tmp_path)
    names = {symbol["name"] for symbol in found["symbols"] if symbol["isExported"]}
    assert {f"randlora_jax.{n}" for n in ("split", "linen.RandLora", "nnx.inject")} <= names
    unknown = [
        f"{symbol['name']}: {detail['message']}"
        for symbol in found["symbols"]
        if symbol["isExported"] and not symbol["isTypeKnown"]
        for detail in symbol["diagnostics"]
    ]
    assert unknown == []
    assert found["completenessScore"] == 1
