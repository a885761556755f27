"""A trajectory in a few lines, as text and as HTML."""

import html
from typing import Any

import numpy as np

from .._jax._enumerations import names_of
from ._stationary_kind import StationaryKind
from ._status import RESULTS

Row = tuple[str, str]


def summary_rows(trajectory: Any) -> list[Row]:
    """What a person looks for first in a `Trajectory` with known values, label by label.

    Of a batch, the range over its runs.
    """
    ts = np.asarray(trajectory.ts)
    runs = "" if ts.ndim == 1 else f"{' × '.join(map(str, ts.shape[:-1]))} runs, "
    losses = np.asarray(trajectory.losses)
    rows = [
        ("times", f"{runs}{ts.shape[-1]} times to t = {_range(ts[..., -1])}"),
        ("loss", f"{_range(losses[..., 0])} → {_range(losses[..., -1])}"),
        ("result", _result_text(trajectory)),
    ]
    stats = trajectory.stats
    name = stats["solver"] or stats["optimizer"]
    if name is not None:
        reason = stats["solver_reason"]
        rows.append(("solver", name if reason is None else f"{name}: {reason}"))
    rows += [("laws", text) for text in _law_texts(trajectory)]
    if trajectory.observed:
        rows.append(("observed", ", ".join(trajectory.observed)))
    if stats["error_estimate"] is not None:
        error = _range(np.asarray(stats["error_estimate"]))
        rows.append(("error", f"{error} of the final weights, estimated"))
    return rows


def as_text(rows: list[Row]) -> str:
    """The rows under one another; a label that repeats is left out."""
    width = max(len(label) for label, _ in rows)
    lines, before = ["Trajectory"], ""
    for label, text in rows:
        shown = "" if label == before else label
        lines.append(f"  {shown:{width}}  {text}")
        before = label
    return "\n".join(lines)


def as_html(rows: list[Row]) -> str:
    """A table in the colours of the page around it."""
    left = 'style="text-align: left; vertical-align: top;'
    line = "border-top: 1px solid; border-color: rgba(128, 128, 128, 0.4);"
    body, before = [], ""
    for label, text in rows:
        is_new = label != before
        rule = line if is_new else ""
        body.append(
            f'<tr style="background: none;">'
            f'<th {left} padding: 2px 12px 2px 0; {rule}">'
            f"{html.escape(label) if is_new else ''}</th>"
            f'<td {left} padding: 2px 0; {rule}">{html.escape(text)}</td></tr>'
        )
        before = label
    return (
        '<table style="border-collapse: collapse; color: inherit;">'
        f'<caption {left} font-weight: bold; color: inherit;">Trajectory</caption>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _result_text(trajectory: Any) -> str:
    stats = trajectory.stats
    names = names_of(trajectory.result, RESULTS)
    message = "" if names.ndim else RESULTS[trajectory.result]
    text = _counts(names) if names.ndim else message or "successful"
    kind = stats["stationary_kind"]
    if kind is not None:
        kinds = names_of(kind, StationaryKind)
        text = _counts(kinds) if kinds.ndim else StationaryKind[kind].split(":")[0]
    pairs, forced = (
        0 if stats[name] is None else int(np.sum(stats[name]))
        for name in ("num_nonunique_pairs", "forced_steps")
    )
    if pairs or forced:
        text += (
            "; one of several solutions, maybe, from t = "
            f"{_smallest(stats['first_nonunique_time']):.4g} on: {pairs} pairs with a "
            f"choice, {forced} forced steps"
        )
    return text


def _law_texts(trajectory: Any) -> list[str]:
    """Every law with the shape of its value and its largest drift, relative to ‖w‖²."""
    times = np.ndim(trajectory.ts)
    squares = [np.asarray(s)[..., 0] for s in trajectory.squared_norms.values()]
    texts = []
    for name, values in trajectory.laws.items():
        values = np.asarray(values)
        shape = values.shape[times:]
        start = np.take(values, [0], axis=times - 1)
        drifts = np.abs(values - start).reshape(*values.shape[:times], -1)
        size = np.sum(squares, axis=0)[..., None, None] if squares else 1
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = drifts / size
        components = f" {shape}" if shape else ""
        texts.append(f"{name}{components} drifts by {_largest(relative):.2g}·‖w‖²")
    return texts


def _counts(names: np.ndarray) -> str:
    found, counts = np.unique(names.ravel(), return_counts=True)
    pairs = sorted(zip(counts.tolist(), found.tolist(), strict=True), reverse=True)
    return ", ".join(f"{count} {name}" for count, name in pairs)


def _range(values: np.ndarray) -> str:
    """One number, or the smallest and the largest of several."""
    low, high = _smallest(values), _largest(values)
    if low == high or not np.isfinite(low):
        return f"{low:.4g}"
    return f"{low:.4g} … {high:.4g}"


def _largest(values: Any) -> float:
    return -_smallest(-np.asarray(values))


def _smallest(values: Any) -> float:
    """The smallest of the numbers that are not NaN; NaN if there is none."""
    values = np.asarray(values)
    known = values[~np.isnan(values)]
    return float(np.min(known)) if known.size else float("nan")
