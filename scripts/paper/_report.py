"""What an experiment returns: claims, controls and numbers, as plain data."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import homoflow
from homoflow import Trajectory

#: Columns of equal length, by name.
Table = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One thing that is said, beside what was measured.

    - `text`: the claim.
    - `measured`: what we found.
    - `holds`: whether that supports the claim (not whether it equals the printed number,
        which may depend on what the paper leaves open).
    - `printed`: the paper's number, or `"—"` where it prints none.
    - `seeds`: of how many random starts this is.
    """

    text: str
    measured: str
    holds: bool
    printed: str = "—"
    seeds: int = 1


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of an experiment.

    - `name`, `title`: for files and headings.
    - `statement`: what the paper says, in a sentence or two.
    - `claims`: what follows from it and can be measured. All should hold.
    - `controls`: the same where the statement does not apply. None may hold: a
        measurement that cannot fail shows nothing.
    - `tables`: the numbers behind claims and figure.
    - `choices`: what the paper leaves open, and what was chosen.
    - `seconds`: how long it took, figure included; NaN if nobody looked.
    """

    name: str
    title: str
    statement: str
    claims: tuple[Claim, ...]
    controls: tuple[Claim, ...]
    tables: Mapping[str, Table]
    choices: tuple[str, ...]
    seconds: float = float("nan")

    @property
    def holds(self) -> bool:
        """Whether every claim holds and every control fails."""
        return all(c.holds for c in self.claims) and not any(
            c.holds for c in self.controls
        )

    @property
    def verdict(self) -> str:
        if any(c.holds for c in self.controls):
            return "shows nothing: a control did not fail"
        failed = sum(not c.holds for c in self.claims)
        return f"fails in {failed} of {len(self.claims)}" if failed else "holds"


def columns(run: Trajectory) -> dict[str, np.ndarray]:
    """Time, loss, gradient norm, squared norms and scalar laws of a run."""
    scalars = {k: v for k, v in run.laws.items() if v.ndim == 1}
    norms = {f"squared_norm {k}": v for k, v in run.squared_norms.items()}
    all_ = {
        "t": run.ts,
        "loss": run.losses,
        "gradient_norm": run.grad_norms,
        **norms,
        **scalars,
    }
    return {name: np.asarray(values) for name, values in all_.items()}


def save(report: Report, config: Any, path: Path) -> None:
    """Writes a report as JSON: every number in full, with the configuration it is of."""
    content = dataclasses.asdict(report)
    content["tables"] = {
        name: {column: np.asarray(values).tolist() for column, values in table.items()}
        for name, table in report.tables.items()
    }
    content["made_by"] = _maker(config)
    # Written whole or not at all: an interruption must not leave half a report.
    part = path.with_suffix(".part")
    text = json.dumps(content, indent=1, default=lambda scalar: scalar.item())
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def load(path: Path, config: Any) -> Report | None:
    """The report in a file; `None` if there is none, or not of `config` by this code."""
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.pop("made_by") != _maker(config):
        return None
    for kind in ("claims", "controls"):
        content[kind] = tuple(Claim(**claim) for claim in content[kind])
    content["choices"] = tuple(content["choices"])
    content["tables"] = {
        name: {column: np.asarray(values) for column, values in table.items()}
        for name, table in content["tables"].items()
    }
    return Report(**content)


def _maker(config: Any) -> dict[str, str]:
    return {"config": repr(config), "source": _source_digest()}


@functools.cache
def _source_digest() -> str:
    """Of the source of homoflow and the experiments, which no run changes."""
    digest = hashlib.sha256()
    for folder in (Path(homoflow.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def overview(report: Report) -> dict[str, str]:
    """A report in one line: verdict, counts, and what its first claim measured."""
    claims, controls = report.claims, report.controls
    return {
        "statement": report.title,
        "verdict": report.verdict,
        "claims that hold": f"{sum(c.holds for c in claims)} of {len(claims)}",
        "controls that fail": f"{sum(not c.holds for c in controls)} of {len(controls)}",
        "starts, up to": f"{max(c.seeds for c in (*claims, *controls)):,}",
        "time": f"{report.seconds:.0f} s",
        "for example": claims[0].measured,
    }


def overview_table(lines: Sequence[Mapping[str, str]]) -> str:
    """What `overview` says of several reports, as a table in Markdown."""
    head = list(lines[0])
    # A bar would end the cell.
    cells = ([value.replace("|", "\\|") for value in line.values()] for line in lines)
    rows = [f"| {' | '.join(row)} |" for row in (head, *cells)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def as_text(report: Report) -> str:
    """Statement, claims, controls and choices as Markdown."""
    lines = [f"## {report.title}: {report.verdict}", "", report.statement, ""]
    lines += _rows("claim", report.claims)
    if report.controls:
        lines += ["", "Controls, which must not hold:", ""]
        lines += _rows("control", report.controls)
    lines += ["", "What the paper leaves open, and what was chosen:", ""]
    lines += [f"- {choice}" for choice in report.choices]
    return "\n".join(lines) + "\n"


def _rows(kind: str, claims: tuple[Claim, ...]) -> list[str]:
    return [
        f"| {kind} | the paper prints | measured here | seeds | holds |",
        "|---|---|---|---|---|",
        *(
            f"| {c.text} | {c.printed} | {c.measured} | {c.seeds} | "
            f"{'yes' if c.holds else 'no'} |"
            for c in claims
        ),
    ]
