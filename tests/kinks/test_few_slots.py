"""Events resolved in few slots, where no more are used; and what work is counted."""

import jax
import numpy as np
import pytest
from problems import relu_regression

import homoflow as hf
from homoflow._kinks.filippov import _few_slots, _iterate


@pytest.fixture(autouse=True)
def programs_of_its_own():
    """The number of few slots is no argument of a compiled flow."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def test_an_event_is_the_same_in_few_slots_and_in_many(monkeypatch):
    few = 1

    def flow():
        solver = hf.Filippov(max_active=24, events=200)
        return hf.flow(*relu_regression(2), 10.0, laws=(), solver=solver)

    monkeypatch.setattr(_few_slots, "FEW", 24)
    whole = flow()
    monkeypatch.setattr(_few_slots, "FEW", few)
    jax.clear_caches()
    part = flow()
    # Some events have room in the few slots, and others do not.
    assert few < whole.stats["largest_sliding_set"]
    for name in ("crossings", "entries", "exits", "largest_sliding_set"):
        assert part.stats[name] == whole.stats[name]
    count = int(whole.events.count)
    assert count > 10
    for name in ("samples", "kinks", "kinds"):
        np.testing.assert_array_equal(
            getattr(part.events, name)[:count], getattr(whole.events, name)[:count]
        )
    np.testing.assert_allclose(part.losses, whole.losses, rtol=1e-10)


def test_gradients_are_counted_as_they_are_computed(monkeypatch):
    """The compiled program itself reports every linearization, and its rows."""
    linearize, seen = _iterate.linearize, []

    def report(rows):
        seen.append(int(rows))

    def linearize_and_report(system, w, base, pairs):
        jax.debug.callback(report, pairs.is_used.sum())
        return linearize(system, w, base, pairs)

    monkeypatch.setattr(_iterate, "linearize", linearize_and_report)
    model, data = relu_regression(3)
    run = hf.flow(model, data, 10.0, laws=(), solver=hf.Filippov(max_active=24))
    jax.effects_barrier()
    assert sum(seen) > 100  # It slides.
    samples = len(data[0])
    assert run.stats["gradient_evaluations"] == pytest.approx(
        len(seen) + sum(seen) / samples
    )
