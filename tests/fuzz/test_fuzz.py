"""A few of the fuzzer's calls, and that it sees what is wrong."""

import dataclasses

import derivatives
import descent_cases
import descent_judge
import flow_cases
import flow_judge
import law_judge
import numpy as np
import pytest
from judgement import Judgement
from kink_oracle import Piecewise
from shrink import shrink

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

#: In oracles of weights of 1e-150, and of runs that diverge.
ORACLES_OVERFLOW = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)
GOOD = {"right", "told", "failed honestly", "not judged"}
#: Some draws of each kind, of which two in a row share their program.
SMOKE = {
    "flow": (flow_cases.draw_case, flow_judge.judge, (0, 1, 250, 251, 700, 701)),
    "descend": (descent_cases.draw_case, descent_judge.judge, (40, 41, 460, 461)),
    "derivative": (derivatives.draw_case, derivatives.judge, (0, 1)),
    "laws": (law_judge.draw_case, law_judge.judge, (3,)),
}
RELU = flow_cases.Case("relu", "squared", "rtol=1e-8", 0, 1.0, 1.0, "normal")


@pytest.mark.slow
@ORACLES_OVERFLOW
@pytest.mark.parametrize(
    ("kind", "number"), [(kind, n) for kind, (*_, ns) in SMOKE.items() for n in ns]
)
def test_drawn_calls_are_right_or_say_that_they_are_not(kind, number):
    draw, judge, _ = SMOKE[kind]
    case = draw(number)
    assert judge(case).outcome in GOOD, case


@pytest.mark.parametrize("kind", [flow_cases, derivatives, descent_cases, law_judge])
def test_a_case_is_drawn_again_by_its_number(kind):
    case = kind.draw_case(1234)
    assert kind.draw_case(1234) == case
    assert eval(repr(case), {"Case": kind.Case}) == case


# The oracle between kinks ----------------------------------------------------------------


def one_unit(w: list[float], x: list, y: list, t: float) -> np.ndarray:
    flow = Piecewise("relu", "squared", np.array(x), np.array(y), 1, 0.0)
    return flow.solve(np.array(w), np.array([0.0, t]), 1e-11)[-1]


def test_the_oracle_follows_a_closed_form():
    """Of L = ½(b·relu(a) + 1)² with a = b > 0: a²/(1 + a²) falls as e^{−2t}."""
    a = 0.8
    end = one_unit([a, a], [[1.0]], [[-1.0]], 0.7)
    share = a**2 / (1 + a**2) * np.exp(-1.4)
    np.testing.assert_allclose(end, np.sqrt(share / (1 - share)), rtol=1e-9)


def test_the_oracle_goes_through_a_kink():
    """Samples 1 and −1 of one unit: beside small steps of Euler's method, written out."""
    start, t, steps = (0.3, 0.9), 0.5, 100_000
    end = one_unit([*start], [[1.0], [-1.0]], [[-4.0], [2.0]], t)
    a, b = start
    for _ in range(steps):
        sign, target = (1, -4) if a > 0 else (-1, 2)
        error = (b * abs(a) - target) / 2
        a, b = a - t / steps * error * b * sign, b - t / steps * error * abs(a)
    assert end[0] < 0 < start[0]
    np.testing.assert_allclose(end, [a, b], rtol=1e-4)


# What is wrong is found ------------------------------------------------------------------


@pytest.mark.slow
@ORACLES_OVERFLOW
def test_a_wrong_flow_is_found(monkeypatch):
    """A negative control: a flow that goes on for one per cent longer."""
    true_flow = hf.flow

    def late(model, data, t1, *, ts, **options):
        run = true_flow(model, data, 1.01 * t1, ts=1.01 * np.asarray(ts), **options)
        return dataclasses.replace(run, ts=run.ts / 1.01)

    monkeypatch.setattr(hf, "flow", late)
    case = dataclasses.replace(RELU, model="tanh", t1=3.0)
    assert flow_judge.judge(case).outcome == "SILENTLY WRONG"


PLAIN = descent_cases.Case((), "heavy ball", (), (), "linear", 0)


def with_longer_clock(run):
    return dataclasses.replace(run, ts=1.001 * run.ts)


def without_momentum(run):
    def cut(account):
        parts = {k: 0 * v if k == "momentum" else v for k, v in account.parts.items()}
        return dataclasses.replace(account, parts=parts)

    accounts = {name: cut(account) for name, account in run.ledger.accounts.items()}
    ledger = dataclasses.replace(run.ledger, accounts=accounts)
    return dataclasses.replace(run, ledger=ledger)


@pytest.mark.slow
@ORACLES_OVERFLOW
@pytest.mark.parametrize("change", [with_longer_clock, without_momentum])
def test_a_wrong_clock_or_ledger_is_found(monkeypatch, change):
    assert descent_judge.judge(PLAIN).outcome == "right"
    true_run = descent_judge.run_descent
    monkeypatch.setattr(descent_judge, "run_descent", lambda *a: change(true_run(*a)))
    assert descent_judge.judge(PLAIN).outcome == "SILENTLY WRONG"


# Shrinking -------------------------------------------------------------------------------


def test_a_case_is_shrunk_to_what_is_needed():
    """The verdict needs two samples and the logistic loss, and nothing else."""
    tried = []

    def judge(case):
        tried.append(case)
        is_wrong = case.samples >= 2 and case.loss == "logistic"
        return Judgement("SILENTLY WRONG" if is_wrong else "right")

    case = flow_cases.Case(
        "deep ReLU MLP", "logistic", "rtol=1e-4", 3, 0.1, 3.0, "sparse", hidden=4
    )
    small, found = shrink(case, judge)
    assert found.outcome == "SILENTLY WRONG"
    assert (small.model, small.loss, small.options) == ("relu", "logistic", "default")
    assert (small.samples, small.hidden, small.style) == (2, 1, "normal")
    assert len(tried) <= 42


def test_parts_of_a_chain_are_dropped():
    case = descent_cases.Case(
        ("clip", "decay", "signs"), "Lion", ("plateau",), ("flattened",), "relu", 5
    )

    def judge(case):
        return Judgement("CRASHED" if "decay" in case.ahead else "right")

    small, _ = shrink(case, judge)
    parts = small.ahead, small.core, small.behind, small.around
    assert parts == (("decay",), "sgd", (), ())
