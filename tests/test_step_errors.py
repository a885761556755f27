"""Every step of the exact flow is judged, also one at whose end a slider is lost.

Nothing reaches such a slider any more, so that the velocity there says nothing about the
step that led to it: it is judged by what the old mode's would have been.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

import homoflow as hf
from homoflow._kinks import System, as_system
from homoflow._kinks.filippov._event_point import event_point, loses_sliders
from homoflow._kinks.filippov._loop import Carry, make_loop
from homoflow._kinks.filippov._progress import Goal, Tolerances

pytestmark = pytest.mark.usefixtures("quick_compilation")

CAPACITY, T1 = 60, 4.0


def small_start() -> tuple[System, Array]:
    """Two ReLU layers and their weights, from N(0, 0.2²)."""
    keys = jr.split(jr.key(1007), 8)
    model = hf.MLP((4, 6, 5, 2), key=keys[0])
    weights = [
        0.2 * jr.normal(key, layer.weight.shape)
        for key, layer in zip(jr.split(keys[1], 9), model.layers, strict=False)
    ]
    model = eqx.tree_at(lambda m: [layer.weight for layer in m.layers], model, weights)
    data = jr.normal(keys[3], (8, 4)), 10 * jr.normal(keys[4], (8, 2))
    problem = hf.make_problem(model, data)
    return as_system(problem), ravel_pytree(problem.weights)[0]


def loses(system: System, carry: Carry) -> Array:
    """Whether the next step ends where a slider is lost."""
    state, arrival = carry.progress.state, carry.arrival
    side = state.tables.side
    trigger = (jnp.arange(side.size) == arrival.pair).reshape(side.shape)
    event, _ = event_point(
        system,
        arrival.t,
        arrival.w,
        state.tables,
        trigger,
        state.point.max_abs_z,
        state.hint,
        CAPACITY,
    )
    return loses_sliders(event, state.sliding.pairs)


@eqx.filter_jit
def first_loss(
    system: System, w0: Array, rtol: Array, rtol_there: Array
) -> tuple[Carry, Array]:
    """Up to the first step that loses a slider, which is judged by its own tolerance."""

    def loop_at(rtol):
        allowed = Tolerances(rtol, jnp.zeros_like(rtol))
        goal = Goal(jnp.asarray(T1), jnp.full(1, T1), allowed, jnp.asarray(10_000))
        return make_loop(
            system,
            w0,
            goal,
            lambda w, loss, v: loss,
            capacity=CAPACITY,
            log_capacity=0,
        )

    def advance(carry):
        run, _ = carry
        ends = loses(system, run)
        return loop_at(jnp.where(ends, rtol_there, rtol)).advance(run), ends

    loop = loop_at(rtol)
    return jax.lax.while_loop(
        lambda c: loop.goes_on(c[0]) & ~c[1],
        advance,
        (loop.start, jnp.asarray(False)),
    )


def test_a_step_that_loses_a_slider_is_judged():
    """At a tolerance that it was not made for it is refused."""
    system, w0 = small_start()
    for there, accepted in ((1e-4, True), (1e-10, False)):
        carry, ends = first_loss(system, w0, jnp.asarray(1e-4), jnp.asarray(there))
        assert ends
        assert carry.progress.is_accepted == accepted
