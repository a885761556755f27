"""Run every method on every problem, keeping each run as soon as it is there."""

import importlib.metadata
import importlib.util
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

from . import methods, round_trip
from .methods import Limit, Method, Solve
from .problems import Problem

#: Tolerance of the exact flow that serves as reference where there is no other.
REFERENCE_RTOL = 1e-12
_PACKAGES = {
    "homoflow": "homoflow",
    "jax": "jax",
    "diffrax": "diffrax",
    "scipy": "scipy",
    "torchdiffeq": "torchdiffeq",
    "sksundae": "scikit-sundae",
}
METHODS: tuple[Method, ...] = (
    methods.filippov(),
    methods.diffrax(dfx.Bosh3()),
    methods.diffrax(dfx.Tsit5()),
    methods.diffrax(dfx.Dopri8()),
    round_trip.scipy("RK45"),
    round_trip.scipy("DOP853"),
    round_trip.scipy("LSODA"),
    round_trip.torchdiffeq("dopri5"),
    round_trip.torchdiffeq("dopri8"),
    round_trip.cvode("Adams"),
    round_trip.cvode("BDF"),
    methods.midpoint(),
)


def missing_packages() -> tuple[str, ...]:
    """Names, as pip knows them, of packages with peers that are not installed."""
    needed = dict.fromkeys(method.needs for method in METHODS)
    return tuple(_PACKAGES[name] for name in needed if not _is_installed(name))


def run_study(
    problems: dict[str, Problem],
    names: Sequence[str],
    path: Path,
    *,
    seconds: float,
    gradients: int,
    points: int | None,
    say: Callable[[str], None],
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All runs, as they are written to `path` after each of them.

    A run is given up after `gradients` evaluations, or `seconds` on the CPU; its method
    is then done with that problem. `points` bounds the settings of each method. Runs of
    an `earlier` study stay, except those that are made anew.
    """
    chosen = [m for m in METHODS if m.name in names and _is_installed(m.needs)]
    study: dict[str, Any] = {
        "versions": {p: importlib.metadata.version(p) for p in _installed()},
        "python": platform.python_version(),
        "missing": list(missing_packages()),
        "problems": dict(earlier["problems"]) if earlier else {},
    }
    write(study, path)
    for name, problem in problems.items():
        say(f"{name}: {problem.title}, {problem.samples} points, to t = {problem.t1:g}")
        entry = _described(problem)
        kept = _kept_runs(study["problems"].get(name), entry)
        entry["runs"] = [run for run in kept if run["method"] not in names]
        study["problems"][name] = entry
        affordable = int(seconds / entry["cpu_seconds_per_gradient"])
        limit = Limit(min(gradients, affordable), seconds)
        reference = _reference(problem, limit)
        for method in chosen:
            solve = method.start(problem, limit)
            for setting in _settings(method, limit)[:points]:
                run = _timed(method, solve, setting)
                run["error"] = problem.error(run.pop("w"), reference)
                entry["runs"].append(run)
                entry["runs"].sort(key=_place)  # Stable: settings stay in order.
                write(study, path)
                say(_line(run))
                if not run["finished"]:
                    break
    return study


def write(study: dict[str, Any], path: Path) -> None:
    """Replaces the file in one step: an interrupted run leaves it whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def _described(problem: Problem) -> dict[str, Any]:
    known = problem.reference is not None
    return {
        "title": problem.title,
        "t1": problem.t1,
        "weights": int(problem.w0.size),
        "samples": problem.samples,
        "slots": problem.slots,
        "reference": "stored" if known else f"Filippov, rtol {REFERENCE_RTOL:g}",
        "cpu_seconds_per_gradient": _seconds_per_gradient(problem),
        "runs": [],
    }


def _place(run: dict[str, Any]) -> int:
    names = [method.name for method in METHODS]
    return names.index(run["method"]) if run["method"] in names else len(names)


def _kept_runs(earlier: dict[str, Any] | None, now: dict[str, Any]) -> list[Any]:
    """The runs of an earlier study of this very problem."""
    facts = ("title", "t1", "weights", "samples")
    if earlier is None or any(earlier[fact] != now[fact] for fact in facts):
        return []
    return earlier["runs"]


def _reference(problem: Problem, limit: Limit) -> np.ndarray:
    if problem.reference is not None:
        return problem.reference
    outcome = methods.filippov().start(problem, limit)(REFERENCE_RTOL)
    if not outcome.finished:
        raise RuntimeError(f"The reference of {problem.title} did not finish.")
    return outcome.w


def _seconds_per_gradient(problem: Problem, count: int = 500) -> float:
    """Of CPU time, inside one compiled loop."""
    gradient = problem.gradient

    @jax.jit
    def repeated(w):
        # A vanishing step keeps the compiler from computing the gradient only once.
        return jax.lax.fori_loop(0, count, lambda _, w: w - 1e-12 * gradient(w), w)

    jax.block_until_ready(repeated(jnp.asarray(problem.w0)))
    started = time.process_time()
    jax.block_until_ready(repeated(jnp.asarray(problem.w0)))
    return (time.process_time() - started) / count


def _settings(method: Method, limit: Limit) -> tuple[float, ...]:
    if method.kind != "fixed":
        return method.settings
    # A number of steps says beforehand what it will cost.
    return tuple(s for s in method.settings if 2 * s <= limit.gradients)


def _timed(method: Method, solve: Solve, setting: float) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = solve(setting)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "method": method.name,
        "kind": method.kind,
        "setting": setting,
        "finished": outcome.finished,
        "gradients": outcome.gradients,
        "forward_passes": outcome.forward_passes,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "w": outcome.w,
    }


def _line(run: dict[str, Any]) -> str:
    how = f"{run['setting']:g}"
    end = f"error {run['error']:.1e}" if run["finished"] else "did not finish"
    return (
        f"  {run['method']:26s} {how:>9s}  {end:15s} {run['gradients']:>11,.0f} "
        f"gradients  {run['cpu_seconds']:7.2f} s CPU  {run['wall_seconds']:7.2f} s"
    )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _installed() -> list[str]:
    return [p for module, p in _PACKAGES.items() if _is_installed(module)]
