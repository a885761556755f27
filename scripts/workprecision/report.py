"""What the runs say: the work at a given error, and by how much the exact flow leads."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

Run = dict[str, Any]
#: Errors at which methods are compared.
ERRORS = (1e-4, 1e-5, 1e-6, 1e-7)
#: At error 1e-6, how many times fewer gradients than the best peer; from error 1e-5 on,
#: how many times less time.
TARGETS = (("gradients", 1e-6, 30.0), ("cpu_seconds", 1e-5, 1.0))


class Work(NamedTuple):
    """Work at an error; `extrapolated` where no run of the method was that exact."""

    amount: float
    extrapolated: bool = False


def work_at(runs: Iterable[Run], error: float, measure: str) -> Work | None:
    """The work of one method at an error, by its finished runs.

    Between the cheapest run that is good enough and the best cheaper one, by a power law.
    Without such a run, from the most accurate one at order 1 (kinks allow no more to a
    method that does not follow them). `None` if nothing finished.
    """
    done = sorted((r for r in runs if is_usable(r)), key=lambda r: r[measure])
    if not done:
        return None
    good = next((i for i, r in enumerate(done) if r["error"] <= error), None)
    if good is None:
        best = min(done, key=lambda r: r["error"])
        return Work(best[measure] * best["error"] / error, extrapolated=True)
    hit, before = done[good], done[:good]
    if not before or hit["error"] == 0:
        return Work(hit[measure])
    near = min(before, key=lambda r: r["error"])
    share = math.log(near["error"] / error) / math.log(near["error"] / hit["error"])
    return Work(near[measure] * (hit[measure] / near[measure]) ** share)


def is_usable(run: Run) -> bool:
    return run["finished"] and math.isfinite(run["error"])


def by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run["method"], []).append(run)
    return grouped


def best_peer(
    runs: Iterable[Run], error: float, measure: str, kinds: Iterable[str]
) -> tuple[str, Work] | None:
    """The method of these kinds with the least work at this error."""
    found = [
        (name, work)
        for name, own in by_method(r for r in runs if r["kind"] in kinds).items()
        if (work := work_at(own, error, measure)) is not None
    ]
    return min(found, key=lambda pair: pair[1].amount, default=None)


def report(study: dict[str, Any]) -> str:
    lines = []
    for name, problem in study["problems"].items():
        runs = problem["runs"]
        lines += ["", f"{name}: {described(problem)}", *_table(runs)]
        lines += [_reference_check(problem), *_forward_passes(runs), *_verdicts(runs)]
    if study["missing"]:
        lines += ["", f"Not installed, left out: {', '.join(study['missing'])}."]
    lines += [
        "",
        "~ extrapolated at order 1 from the method's most accurate finished run.",
    ]
    return "\n".join(lines)


def described(problem: dict[str, Any]) -> str:
    return (
        f"{problem['title']}; {problem['weights']:,} weights, {problem['samples']} "
        f"points, to t = {problem['t1']:g}"
    )


def _table(runs: list[Run]) -> list[str]:
    errors = "".join(f"{f'at {e:g}':>14s}" for e in ERRORS)
    blocks = []
    for measure, title in (("gradients", "gradients"), ("cpu_seconds", "CPU seconds")):
        blocks.append(f"  {title:26s}{errors}")
        for name, own in by_method(runs).items():
            cells = (_cell(work_at(own, e, measure)) for e in ERRORS)
            blocks.append(f"    {name:24s}" + "".join(f"{c:>14s}" for c in cells))
    return blocks


def _cell(work: Work | None) -> str:
    if work is None:
        return "none finished"
    return ("~" if work.extrapolated else "") + f"{work.amount:,.4g}"


def _reference_check(problem: dict[str, Any]) -> str:
    """How far constant steps, which know nothing of kinks, come to the reference."""
    runs = [r for r in problem["runs"] if r["kind"] == "fixed" and is_usable(r)]
    line = f"  reference: {problem['reference']}"
    if not runs:
        return f"{line}; not checked by constant steps"
    few, many = runs[0]["setting"], runs[-1]["setting"]
    errors = ", ".join(f"{r['error']:.1e}" for r in runs)
    return f"{line}; midpoint at {few:,.0f} … {many:,.0f} steps differs by {errors}"


def _forward_passes(runs: list[Run]) -> list[str]:
    """What the exact flow does beside gradients: without the backward pass, a third."""
    exact = [r for r in runs if r["kind"] == "exact" and is_usable(r)]
    told = ", ".join(
        f"{r['gradients']:,.0f} + {r['forward_passes']:,} at {r['error']:.0e}"
        for r in exact
    )
    return [f"  gradients + forward passes of the exact flow: {told}"] if exact else []


def _verdicts(runs: list[Run]) -> list[str]:
    return [
        line
        for measure, error, target in TARGETS
        for kinds, who in ((("adaptive",), "peer"), (("fixed",), "constant steps"))
        if (line := _verdict(runs, measure, error, target, kinds, who)) is not None
    ]


def _verdict(runs, measure, error, target, kinds, who) -> str | None:
    ours = best_peer(runs, error, measure, ("exact",))
    theirs = best_peer(runs, error, measure, kinds)
    if ours is None or theirs is None:
        return None
    name, work = theirs
    ratio = work.amount / ours[1].amount
    what = {"gradients": "fewer gradients", "cpu_seconds": "less CPU time"}[measure]
    return (
        f"  at {error:g}: {_three_digits(ratio)} times {what} than {name} (best {who}"
        f"{', ~' if work.extrapolated else ''}); target {target:g}: "
        f"{'ok' if ratio > target and not ours[1].extrapolated else 'MISS'}"
    )


def _three_digits(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
