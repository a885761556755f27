"""Run every method on every problem, keeping each run as soon as it is there."""

import hashlib
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
import numpy as np
from workprecision.study import write

import homoflow as hf

from . import compiled, peers
from .compiled import Method, Outcome, Solve
from .problems import Problem

#: Tolerance of the reference, by Dopri8.
REFERENCE_RTOL = 1e-13
#: Runs shorter than this are repeated, and the fastest counts.
_SHORT, _REPEATS = 0.5, 3
_PACKAGES = {
    "homoflow": "homoflow",
    "jax": "jax",
    "diffrax": "diffrax",
    "scipy": "scipy",
    "torchdiffeq": "torchdiffeq",
    "torchode": "torchode",
    "sksundae": "scikit-sundae",
}
_RIVALS = (
    compiled.diffrax(dfx.Tsit5()),
    compiled.diffrax(dfx.Dopri8()),
    compiled.diffrax(dfx.Kvaerno5(), most_weights=2_000),
    peers.cvode("dense"),
    peers.cvode("gmres"),
)
METHODS: tuple[Method, ...] = (
    compiled.homoflow(),
    compiled.homoflow("homoflow ExponentialAdams", hf.ExponentialAdams()),
    compiled.homoflow("homoflow Rodas5P", hf.Rodas5P())._replace(most_weights=2_000),
    *_RIVALS,
    *map(compiled.with_our_softplus, _RIVALS),
    peers.scipy("RK45"),
    peers.scipy("DOP853"),
    peers.scipy("LSODA"),
    peers.scipy("BDF"),
    peers.scipy("Radau"),
    peers.torchdiffeq("dopri5"),
    peers.torchdiffeq("dopri8"),
    peers.torchode("Dopri5"),
    peers.torchode("Tsit5"),
    compiled.gradient_descent(),
)


def missing_packages() -> list[str]:
    """Names, as pip knows them, of packages with peers that are not installed."""
    needed = dict.fromkeys(method.needs for method in METHODS)
    return [_PACKAGES[name] for name in needed if not _is_installed(name)]


def run_study(
    problems: dict[str, Callable[[], Problem]],
    names: Sequence[str],
    path: Path,
    *,
    seconds: float,
    every: int = 1,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All runs, written to `path` after each of them.

    A run that takes more than about `seconds` on the CPU is given up, and its method is
    then done with that problem. Of each method's settings only one in `every` is run.
    Runs that `path` has of other problems and methods stay.
    """
    study = _begun(path)
    chosen = [m for m in METHODS if m.name in names and _is_installed(m.needs)]
    for key, build in problems.items():
        problem = build()
        say(f"{key}: {problem.title}, {problem.size:,} weights, to t = {problem.t1:g}")
        entry = _entry(study, key, problem, names)
        flow = _reference(problem, path.parent, say)
        for method in chosen:
            if method.only_softplus and not problem.is_softplus:
                continue
            if problem.size > method.most_weights:
                entry["left_out"].append(f"{method.name}: dense matrices, not tried")
                continue
            say(f"  {method.name}")
            solve = method.start(problem, seconds)
            for setting in method.settings(problem, flow)[every - 1 :: every]:
                run = _timed(method, solve, setting)
                run["error"] = problem.error(run.pop("ends"), flow[:, -1])
                entry["runs"].append(run)
                write(study, path)
                say(_line(run))
                if not run["finished"] and run["cpu_seconds"] > 0.2 * seconds:
                    break
            jax.clear_caches()
        write(study, path)
    return study


def _begun(path: Path) -> dict[str, Any]:
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else {}
    installed = [p for module, p in _PACKAGES.items() if _is_installed(module)]
    return {
        "versions": {p: importlib.metadata.version(p) for p in installed},
        "python": platform.python_version(),
        "missing": missing_packages(),
        "problems": earlier.get("problems", {}),
    }


def _entry(
    study: dict[str, Any], key: str, problem: Problem, names: Sequence[str]
) -> dict[str, Any]:
    """The place of a problem's runs; runs of the very same problem stay in it."""
    facts = {
        "title": problem.title,
        "t1": problem.t1,
        "weights": problem.size,
        "seeds": problem.seeds,
        "is_stiff": problem.is_stiff,
        "identity": _identity(problem),
    }
    earlier = study["problems"].get(key, {})
    same = earlier.get("identity") == facts["identity"]
    kept = [r for r in earlier["runs"] if r["method"] not in names] if same else []
    study["problems"][key] = {**facts, "left_out": [], "runs": kept}
    return study["problems"][key]


def _identity(problem: Problem) -> str:
    arrays = [problem.starts, *map(np.asarray, jax.tree.leaves(problem.data))]
    digest = hashlib.sha256(repr((problem.t1, problem.title)).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _reference(problem: Problem, folder: Path, say) -> np.ndarray:
    """The flow of the judged seeds, kept for later runs of the same problem."""
    path = folder / "references" / f"{_identity(problem)}.npy"
    if not path.exists():
        started = time.process_time()
        flow = compiled.reference_path(problem, REFERENCE_RTOL)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, flow)
        say(f"  reference, {time.process_time() - started:.1f} s CPU")
    return np.load(path)


def _timed(method: Method, solve: Solve, setting: float) -> dict[str, Any]:
    outcome, cpu, wall = _once(solve, setting)
    if outcome.finished:
        # The route that `flow` takes at a tolerance may be compiled with its first run.
        repeats = _REPEATS if cpu < _SHORT else 2
        again = [_once(solve, setting)[1:] for _ in range(repeats - 1)]
        cpu, wall = min((cpu, wall), *again)
    return {
        "method": method.name,
        "kind": method.kind,
        "setting": setting,
        "finished": outcome.finished,
        "gradients": None if np.isnan(outcome.gradients) else outcome.gradients,
        "seeds": len(outcome.ends),
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "seconds_per_seed": cpu / len(outcome.ends),
        "facts": outcome.facts,
        "ends": outcome.ends,
    }


def _once(solve: Solve, setting: float) -> tuple[Outcome, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    outcome = solve(setting)
    return outcome, time.process_time() - cpu, time.perf_counter() - wall


def _line(run: dict[str, Any]) -> str:
    end = f"error {run['error']:.1e}" if run["finished"] else "did not finish"
    count = "" if run["gradients"] is None else f"{run['gradients']:,.0f} gradients"
    return (
        f"    {run['setting']:>9g}  {end:15s} {run['cpu_seconds']:8.3f} s CPU "
        f"{run['wall_seconds']:8.3f} s  {count} {run['facts']}"
    )


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
