"""`scripts/work_precision.py`: its numbers, its quick path, and how it is interrupted."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import scipy.integrate
import work_precision
from workprecision import picture, study
from workprecision.methods import Method, Outcome
from workprecision.problems import PROBLEMS
from workprecision.report import best_peer, work_at

pytestmark = pytest.mark.slow

EXACT, MIDPOINT = "homoflow Filippov", "midpoint, constant steps"
METHODS = (EXACT, "SciPy RK45", MIDPOINT)
PNG = b"\x89PNG\r\n\x1a\n"


def stored(folder):
    text = (folder / "work_precision.json").read_text(encoding="utf-8")
    return json.loads(text)


def runs_of(problem, name):
    return [run for run in problem["runs"] if run["method"] == name]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    argv = ["--quick", "--out", str(out), "--methods", *METHODS]
    assert work_precision.main(argv) == 0
    return out


def test_quick_draws_what_it_ran(quick, capsys):
    problem = stored(quick)["problems"]["biased"]
    assert {run["method"] for run in problem["runs"]} == set(METHODS)
    picture = quick / "work_precision.png"
    first = picture.read_bytes()
    assert first.startswith(PNG)
    picture.unlink()
    assert work_precision.main(["--draw-only", "--out", str(quick)]) == 0
    assert picture.read_bytes() == first
    assert "fewer gradients than" in capsys.readouterr().out


def test_errors_are_those_of_an_independent_integration(quick):
    """Constant steps come ever nearer to the reference, which the exact flow gave."""
    problem = stored(quick)["problems"]["biased"]
    errors = [run["error"] for run in runs_of(problem, MIDPOINT)]
    assert errors[0] > 4 * errors[-1]
    assert errors[-1] < 1e-5
    assert runs_of(problem, EXACT)[-1]["error"] < 1e-6


def test_scipy_is_run_as_its_users_run_it(quick):
    run = runs_of(stored(quick)["problems"]["biased"], "SciPy RK45")[-1]
    problem = PROBLEMS["biased"]()

    def rate(t, w):
        return -np.asarray(problem.gradient(w))

    end, tolerance = work_precision.QUICK_T1, run["setting"]
    solution = scipy.integrate.solve_ivp(
        rate, (0, end), problem.w0, rtol=tolerance, atol=tolerance * problem.scale
    )
    assert run["gradients"] == solution.nfev
    assert run["finished"]


def test_diffrax_gradients_are_those_that_were_called():
    problem, calls = PROBLEMS["biased"](), []

    def gradient(w):
        jax.debug.callback(lambda: calls.append(1))
        return PROBLEMS["biased"]().gradient(w)

    vars(problem)["gradient"] = gradient
    bosh3 = next(m for m in study.METHODS if m.name == "Diffrax Bosh3")
    solve = bosh3.start(problem, study.Limit(3_000, 10.0))
    jax.effects_barrier()
    calls.clear()
    outcome = solve(1e-3)
    jax.effects_barrier()
    assert outcome.finished
    assert outcome.gradients == len(calls) > 500


def run(work, error, finished=True, method="a", kind="adaptive"):
    return {
        "method": method, "kind": kind, "finished": finished,
        "gradients": work, "error": error,
    }  # fmt: skip


def test_work_at_an_error():
    runs = [run(100, 1e-2), run(1_000, 1e-4), run(5_000, 9.0, finished=False)]
    between, beyond = (work_at(runs, e, "gradients") for e in (1e-3, 1e-6))
    assert between is not None
    assert beyond is not None
    assert between.amount == pytest.approx(100 * 10**0.5)  # Order 2 from 1e-2 to 1e-4.
    assert not between.extrapolated
    assert beyond.amount == pytest.approx(100_000)  # Order 1 from (1000, 1e-4).
    assert beyond.extrapolated
    assert work_at(runs[2:], 1e-3, "gradients") is None
    found = best_peer(
        [*runs, run(50_000, 1e-7, method="b")], 1e-6, "gradients", ["adaptive"]
    )
    assert found is not None
    assert found[0] == "b"


@pytest.fixture
def instant(monkeypatch):
    """Nothing is timed or drawn: for methods that are not real."""
    monkeypatch.setattr(study, "_seconds_per_gradient", lambda problem: 1e-4)
    monkeypatch.setattr(picture, "draw", lambda done, path: path)


@pytest.mark.usefixtures("instant")
def test_runs_are_added_to_those_of_the_same_problem_only(tmp_path, monkeypatch):
    first, second = fake("SciPy RK45"), fake("SciPy LSODA")
    monkeypatch.setattr(study, "METHODS", (first, second))
    monkeypatch.setattr(study, "_is_installed", lambda module: module == "scipy")
    argv = ["--problems", "dense", "--out", str(tmp_path), "--add", "--methods"]

    def methods():
        runs = stored(tmp_path)["problems"]["dense"]["runs"]
        return [(r["method"], r["finished"]) for r in runs]

    work_precision.main([*argv, second.name])
    work_precision.main([*argv, first.name])
    both = [(m.name, finished) for m in (first, second) for finished in (True, False)]
    assert methods() == both
    other = replace(PROBLEMS["dense"](), t1=1.0)
    monkeypatch.setitem(PROBLEMS, "dense", lambda: other)
    work_precision.main([*argv, second.name])
    assert methods() == both[2:]


@pytest.mark.usefixtures("instant")
def test_missing_packages_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "_is_installed", lambda module: module == "scipy")
    never = fake("torchdiffeq x", needs="torchdiffeq")
    monkeypatch.setattr(study, "METHODS", (never, fake("SciPy RK45")))
    assert work_precision.main(["--problems", "dense", "--out", str(tmp_path)]) == 0
    done = stored(tmp_path)
    assert done["missing"] == ["torchdiffeq"]
    assert {r["method"] for r in done["problems"]["dense"]["runs"]} == {"SciPy RK45"}
    assert "left out: torchdiffeq" in capsys.readouterr().out


def test_interrupted_runs_keep_what_is_done(tmp_path, monkeypatch, capsys):
    def interrupted(setting):
        raise KeyboardInterrupt

    methods = fake("SciPy RK45"), fake("CVODE BDF", interrupted)
    monkeypatch.setattr(study, "METHODS", methods)
    monkeypatch.setattr(study, "_is_installed", lambda module: module == "scipy")
    assert work_precision.main(["--problems", "dense", "--out", str(tmp_path)]) == 130
    runs = stored(tmp_path)["problems"]["dense"]["runs"]
    # The second did not finish: a method stops there.
    assert [r["finished"] for r in runs] == [True, False]
    assert (tmp_path / "work_precision.png").read_bytes().startswith(PNG)
    assert "Interrupted" in capsys.readouterr().out


def fake(name, solve=None, needs="scipy"):
    def start(problem, limit):
        assert problem.reference is not None

        def stopping(setting):
            return Outcome(2 * problem.reference, setting > 1e-3, 10 / setting)

        return solve or stopping

    return Method(name, "adaptive", needs, (1e-2, 1e-3, 1e-4), start)
