"""One version, one command on every machine, and hooks that need no network."""

import re
import tomllib
from pathlib import Path

import homoflow as hf

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_there_is_one_version():
    assert hf.__version__ == PROJECT["version"]
    assert f"\nversion: {hf.__version__}\n" in read("CITATION.cff")


def test_every_machine_runs_the_same_command_on_all_pythons():
    workflow = read(".github/workflows/ci.yml")
    assert re.findall(r"- run: (.*)", workflow) == [".ci/run"]
    pythons = [
        name.rsplit(" ", 1)[1]
        for name in PROJECT["classifiers"]
        if re.fullmatch(r".*Python :: 3\.\d+", name)
    ]
    assert re.search(r"python: \[(.*)\]", workflow)[1] == ", ".join(  # pyright: ignore
        f'"{version}"' for version in pythons
    )


def test_commit_hooks_download_nothing():
    hooks = read(".pre-commit-config.yaml")
    assert re.findall(r"repo: (.*)", hooks) == ["local"]
    assert set(re.findall(r"language: (.*)", hooks)) == {"system"}
