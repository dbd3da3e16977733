"""Runs mypy and pyright as a user would, and reads what they say."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Report:
    """One error of a checker."""

    file: str
    line: int
    rule: str
    message: str


def mypy(folder: pathlib.Path) -> list[Report]:
    """The errors of mypy in its default mode, in the files of a folder."""
    command = ["mypy", "--output=json", f"--cache-dir={folder / 'cache'}"]
    found = [json.loads(line) for line in _run(command, folder).splitlines()]
    return [
        Report(one["file"], one["line"], one["code"] or "", one["message"])
        for one in found
        if one["severity"] == "error" and (folder / one["file"]).parent == folder
    ]


def pyright(folder: pathlib.Path) -> list[Report]:
    """The errors of pyright in its default mode, in the files of a folder."""
    found = json.loads(_run(["pyright", "--outputjson"], folder))["generalDiagnostics"]
    return [
        Report(
            pathlib.Path(one["file"]).name,
            one["range"]["start"]["line"] + 1,
            one.get("rule", ""),
            one["message"],
        )
        for one in found
        if one["severity"] == "error"
    ]


def completeness(folder: pathlib.Path) -> dict:
    """What `pyright --verifytypes` says of the package's public symbols."""
    command = ["pyright", "--outputjson", "--verifytypes", "randlora_jax", "--ignoreexternal"]
    return json.loads(_run(command, folder))["typeCompleteness"]


def _run(command: list[str], folder: pathlib.Path) -> str:
    """What a checker prints, far from this project's own configuration of it.

    The package is found by its path, since the hook of an editable installation is code, which no
    checker runs; and everything else in this environment, which `--verifytypes` looks for in PATH
    alone.
    """
    files = sorted(path.name for path in folder.glob("*.py"))
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", *command, *files],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: it found errors
    return done.stdout
