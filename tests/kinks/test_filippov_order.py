"""At what order things converge where the flow slides: the exact flow, descent, midpoint.

The problem slides with two pairs between the times 7.1 and 9.7 and with five between
14.1 and 19.5, without an event; between 9.0 and 19.5 six pairs begin to slide.
"""

import numpy as np
import pytest
from jax import numpy as jnp
from oracles import midpoint
from problems import flat, relative_error, relu_regression

import homoflow as hf

MODEL, DATA = relu_regression()
RTOLS = 10.0 ** -np.arange(6, 10.1, 0.5)


def exactly(model, t1: float, rtol: float) -> hf.Trajectory:
    return hf.flow(
        model,
        DATA,
        t1,
        solver=hf.Filippov(max_active=40),
        ts=[0.0, t1],
        laws=(),
        rtol=rtol,
    )


@pytest.fixture(scope="module")
def at():
    """The model at a time: the start of a stretch."""
    return lambda t: exactly(MODEL, t, 1e-10).model


def order(steps, errors) -> float:
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize(
    ("start", "end", "entries"),
    [(14.1, 19.5, 5), (9.0, 19.5, 6)],
    ids=["slides", "enters"],
)
def test_steps_have_the_order_of_runge_and_kutta(at, start, end, entries):
    model, t1 = at(start), end - start
    truth = exactly(model, t1, 1e-12)
    runs = [exactly(model, t1, rtol) for rtol in RTOLS]
    steps = [int(run.stats["steps"]) for run in runs]
    errors = [relative_error(run.model, flat(truth.model)) for run in runs]
    assert steps[-1] > 5 * steps[0]
    assert 3.6 < order(steps, errors) < 4.6
    # Those that slide at the start enter there.
    assert truth.stats["entries"] == entries
    assert truth.stats["largest_sliding_set"] > 4
    assert truth.stats["num_nonunique_pairs"] == 0


@pytest.mark.parametrize(("start", "end"), [(14.1, 19.5), (9.0, 19.5)])
def test_midpoint_is_of_order_one_there(at, start, end):
    """The control: for a smooth field this method is of order two."""
    model, t1 = at(start), end - start
    truth = exactly(model, t1, 1e-10).model
    steps = (200 * 2 ** np.arange(0, 7, 0.5)).astype(int)
    errors = [
        relative_error(truth, np.asarray(midpoint(model, DATA, t1, jnp.asarray(n))))
        for n in steps
    ]
    assert 0.8 < order(steps, errors) < 1.2


def test_gradient_descent_converges_to_the_exact_flow_at_order_one(at):
    model, t1 = at(7.1), 2.6
    truth = flat(exactly(model, t1, 1e-10).model)
    steps = 200 * 4 ** np.arange(4)
    ends = [
        hf.descend(
            model, DATA, steps=int(n), learning_rate=t1 / n, laws=(), record_every=int(n)
        ).model
        for n in steps
    ]  # fmt: skip
    errors = [relative_error(end, truth) for end in ends]
    assert order(steps, errors) == pytest.approx(1, abs=0.1)
