"""A few of the fuzzer's calls, and that it sees what is wrong."""

import dataclasses

import numpy as np
import pytest
from cases import Call, Case, draw_case
from judge import judge

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOOD = {"right", "told", "failed honestly", "not judged"}
#: Two draws of a program each.
SMOKE = [0, 1, 250, 251, 700, 701]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", SMOKE)
def test_drawn_calls_are_right_or_say_that_they_are_not(number):
    case = draw_case(number)
    assert judge(case).outcome in GOOD, case.snippet()


def test_a_case_is_drawn_again_by_its_seed():
    case = draw_case(1234)
    first, second = case.draw(), case.draw()
    np.testing.assert_array_equal(first.x, second.x)
    assert eval(case.snippet().removesuffix(".draw()"), {"Case": Case}) == case


def _moves(call: Call) -> bool:
    return call.scale == 1 and call.t1 == 3 and 0.5 < np.max(np.abs(call.x)) < 5


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_answer_is_found(monkeypatch):
    """A negative control: a flow that goes on for one per cent longer."""
    true_flow = hf.flow

    def late(model, data, t1, *, ts, **options):
        run = true_flow(model, data, 1.01 * t1, ts=1.01 * np.asarray(ts), **options)
        return dataclasses.replace(run, ts=run.ts / 1.01)

    monkeypatch.setattr(hf, "flow", late)
    cases = (Case("tanh", "squared", "rtol=1e-8", seed) for seed in range(100))
    case = next(c for c in cases if _moves(c.draw()))
    assert judge(case).outcome == "SILENTLY WRONG"
