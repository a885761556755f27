"""Time at equal error, and how that compares with what is aimed at."""

import math
from collections.abc import Iterable
from typing import Any

from workprecision.report import Run, by_method, is_usable

#: Relative errors of the final weights at which methods are compared.
ERRORS = (1e-4, 1e-6, 1e-8)
OURS = "homoflow"
#: Beside it: its solver for stiff flows, named; and others. Those with * have the gradient
#: that homoflow makes of a softplus network.
ADAMS = "homoflow ExponentialAdams"
RIVALS = (ADAMS, "CVODE", "CVODE*", "Diffrax", "Diffrax*")
TIME, COUNT = "seconds_per_seed", "gradients"
#: Times less than the best Diffrax solver where the problem is stiff; seeds of a batch
#: for one of CVODE.
_STIFF_TARGET, _BATCH_TARGET = 10.0, 4.0


def amount_at(runs: Iterable[Run], error: float, measure: str) -> float | None:
    """What one method needs for an error, between its runs by a power law.

    Of the cheapest run that is good enough and the best cheaper one. Where every run is
    good enough it is the cheapest, an upper bound; `None` where none is.
    """
    known = (r for r in runs if is_usable(r) and r[measure] is not None)
    done = sorted(known, key=lambda r: r[measure])
    good = next((i for i, r in enumerate(done) if r["error"] <= error), None)
    if good is None:
        return None
    hit, before = done[good], done[:good]
    if not before or hit["error"] == 0:
        return hit[measure]
    near = min(before, key=lambda r: r["error"])
    share = math.log(near["error"] / error) / math.log(near["error"] / hit["error"])
    return near[measure] * (hit[measure] / near[measure]) ** share


def report(study: dict[str, Any]) -> str:
    lines = []
    for key, problem in study["problems"].items():
        runs = problem["runs"]
        if not runs:
            continue
        lines += ["", f"{key}: {described(problem)}", *_table(runs)]
        lines += [f"  left out: {who}" for who in problem["left_out"]]
        lines += [_reference_check(runs), *_verdicts(key, problem)]
    if study["missing"]:
        lines += ["", f"Not installed, left out: {', '.join(study['missing'])}."]
    return "\n".join(lines)


def markdown(study: dict[str, Any]) -> str:
    """Seconds of homoflow and the fastest of each of its rivals, at each of `ERRORS`."""
    heads = ("problem", OURS, *RIVALS)
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for problem in study["problems"].values():
        runs = by_method(problem["runs"])
        cells = [described(problem)]
        for who in (OURS, *RIVALS):
            of = [own for name, own in runs.items() if _is_of(name, who)]
            # What was not run is no miss.
            cells.append(" / ".join(_fastest(of, e) for e in ERRORS) if of else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_of(name: str, who: str) -> bool:
    """Whether a method is that one, or of that library."""
    return name == who or (who != OURS and _library(name) == who)


def _fastest(methods: list[list[Run]], error: float) -> str:
    amounts = (amount_at(own, error, TIME) for own in methods)
    known = [amount for amount in amounts if amount is not None]
    return f"{min(known):.2g}" if known else "–"


def described(problem: dict[str, Any]) -> str:
    size = f"{problem['weights']:,} weights"
    return f"{problem['title']}; {size}, to t = {problem['t1']:g}"


def _table(runs: list[Run]) -> list[str]:
    columns = [*((TIME, e) for e in ERRORS), *((COUNT, e) for e in ERRORS)]
    heads = [f"{'s' if m == TIME else 'grads'} at {e:.0e}" for m, e in columns]
    rows = [f"  {'CPU time and gradients a seed':28s}" + "".join(map(_cell, heads))]
    for name, own in by_method(runs).items():
        cells = (_number(amount_at(own, e, m)) for m, e in columns)
        rows.append(f"    {name:26s}" + "".join(map(_cell, cells)))
    return rows


def _cell(text: str) -> str:
    return f"{text:>16s}"


def _number(amount: float | None) -> str:
    return "–" if amount is None else f"{amount:,.3g}"


def _reference_check(runs: list[Run]) -> str:
    """How near another program comes to the reference, which Diffrax computed."""
    others = [r for r in runs if is_usable(r) and not _is_like_reference(r)]
    best = min(others, key=lambda r: r["error"], default=None)
    if best is None:
        return "  reference: not checked by another program"
    return f"  reference: {best['method']} comes within {best['error']:.1e} of it"


def _is_like_reference(run: Run) -> bool:
    return _library(run["method"]) in (OURS, "Diffrax", "Diffrax*")


def _library(name: str) -> str:
    return name.split()[0]


def _verdicts(key: str, problem: dict[str, Any]) -> list[str]:
    runs = problem["runs"]
    if key == "e":
        return [_ratio_line(runs, 1e-6, COUNT, "Diffrax Dopri8", 1.0)]
    target = _BATCH_TARGET if problem["seeds"] > 1 else 1.0
    targets = {"CVODE": target, "CVODE*": target}
    if problem["seeds"] == 1 and problem["is_stiff"]:
        targets |= {"Diffrax": _STIFF_TARGET, "Diffrax*": _STIFF_TARGET}
    present = {_library(run["method"]) for run in runs}
    return [
        _ratio_line(runs, error, TIME, rivals, target)
        for rivals, target in targets.items()
        if rivals in present
        for error in ERRORS
    ]


def _ratio_line(
    runs: list[Run], error: float, measure: str, rivals: str, target: float
) -> str:
    """How many times less than the best of `rivals`, beside the target."""
    amounts = {
        name: amount
        for name, own in by_method(runs).items()
        if (amount := amount_at(own, error, measure)) is not None
    }
    theirs = {name: a for name, a in amounts.items() if _is_of(name, rivals)}
    what = "CPU time a seed" if measure == TIME else "gradients"
    start = f"  at {error:g}: "
    if OURS not in amounts:
        return f"{start}homoflow has no run that good: MISS"
    if not theirs:
        return f"{start}no run of {rivals} that good"
    best = min(theirs, key=lambda name: theirs[name])
    ratio = theirs[best] / amounts[OURS]
    verdict = "ok" if ratio >= target else "MISS"
    return f"{start}{ratio:.3g} times less {what} than {best}; target {target:g}: {verdict}"
