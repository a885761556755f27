"""What an experiment returns, and how it is written down."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._trajectory import Trajectory


@dataclasses.dataclass(frozen=True)
class Claim:
    """One thing the paper says, beside what was measured.

    - `text`: the claim.
    - `printed`: the paper's number, or `"—"` where it prints none.
    - `measured`: ours.
    - `holds`: whether our measurement supports the claim (not whether it equals the
        printed number, which may depend on what the paper leaves open).
    """

    text: str
    printed: str
    measured: str
    holds: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of an experiment.

    - `name`, `title`: for files and headings.
    - `claims`: what the paper says and what was measured.
    - `runs`: the trajectories, by name.
    - `choices`: what the paper leaves open, and what was chosen.
    """

    name: str
    title: str
    claims: tuple[Claim, ...]
    runs: Mapping[str, Trajectory]
    choices: tuple[str, ...]


def table(report: Report) -> list[dict[str, Any]]:
    """Loss, gradient norm, squared norms and scalar laws of every run, at its times."""
    rows = []
    for run_name, run in report.runs.items():
        scalars = {k: v for k, v in run.laws.items() if v.ndim == 1}
        norms = {f"squared_norm {k}": v for k, v in run.squared_norms.items()}
        for i, t in enumerate(run.ts):
            row = {
                "run": run_name,
                "t": float(t),
                "loss": float(run.losses[i]),
                "gradient_norm": float(run.grad_norms[i]),
            }
            row |= {k: float(v[i]) for k, v in {**norms, **scalars}.items()}
            rows.append(row)
    return rows


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows as CSV, with the columns in order of first appearance."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def as_text(report: Report) -> str:
    """Claims and choices as Markdown."""
    lines = [
        f"## {report.title}",
        "",
        "| claim | the paper prints | measured here | holds |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {c.text} | {c.printed} | {c.measured} | {'yes' if c.holds else 'NO'} |"
        for c in report.claims
    ]
    lines += ["", "What the paper leaves open, and what was chosen:", ""]
    lines += [f"- {choice}" for choice in report.choices]
    return "\n".join(lines) + "\n"
