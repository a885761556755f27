"""The flow's clock in gradient descent: how much flow time one step takes.

A step of gradient descent with learning rate η takes time η; with momentum μ the
velocity settles at 1/(1−μ) times the gradient, and a step takes η/(1−μ). Which of these
holds is measured by feeding the optimizer an impulse.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._optimizer_probe import NUM_STEPS, OptimizerProbe, read_by_probe

#: Sizes of the impulses are this and its inverse.
_SMALL = 2.0**-10


class Clock(eqx.Module):
    """Flow time per step, in units of the learning rate, and what that rests on.

    - `time_per_step`: 1 for gradient descent, 1/(1−μ) with momentum.
    - `has_limit`: whether the method follows gradient flow as the learning rate → 0.
    - `note`: one sentence, empty for plain gradient descent.
    """

    time_per_step: float = eqx.field(static=True)
    has_limit: bool = eqx.field(static=True)
    note: str = eqx.field(static=True)

    @property
    def fact(self) -> str:
        """One line for `stats`."""
        name = "flow time" if self.has_limit else "sum of learning rates"
        return f"{name}: {self.note}" if self.note else name


def read_clock(make_optimizer: Callable, weights: PyTree) -> Clock:
    """The clock of `make_optimizer(1.0)` on weights of this structure.

    Superposition tells whether the optimizer is linear in the gradients. If it is, a
    filter with one pole μ answers an impulse with a geometric tail, whose sum is the
    time per step; if it is not, no rescaling of time makes its small steps follow the
    flow.
    """
    return _read(make_optimizer, weights)


@read_by_probe
def _read(probe: OptimizerProbe) -> Clock:
    respond = _impulse_response(probe)
    random = np.random.default_rng(0)
    one, two = _SMALL * random.standard_normal((2, NUM_STEPS, probe.size))
    separately = respond(one, True) + respond(two, True)
    if not _is_close(separately, respond(one + two, True)):
        return _without_limit(
            "steps are not a linear function of the gradients (as in Adam), so there is "
            "no gradient-flow limit."
        )
    impulse = np.zeros((NUM_STEPS, probe.size))
    impulse[0] = 1
    small, large = _SMALL * impulse, impulse / _SMALL
    response = -respond(small, False) / _SMALL
    if not _is_close(response, response[:, :1]):
        return _without_limit(
            "weights move at different rates, so the limit is a preconditioned flow."
        )
    time_per_step, pole = _impulse_response_sum(response[:, 0])
    if time_per_step is None or time_per_step <= 0:
        return _without_limit(
            "the optimizer's memory is not that of heavy-ball or Nesterov momentum."
        )
    notes = []
    if pole or time_per_step != 1:
        reason = f"momentum {pole:g}, " if pole else ""
        notes.append(f"{reason}a step of η takes time {time_per_step:g} η.")
    if not _is_close(response, -respond(large, False) * _SMALL):
        notes.append("large gradients are cut (clipping), and then it is not.")
    if not _is_close(response, -respond(small, True) / _SMALL):
        notes.append("weights decay, so the limit is the flow with weight decay.")
    return Clock(time_per_step, True, " ".join(notes))


def _without_limit(note: str) -> Clock:
    return Clock(1.0, False, note)


def _impulse_response(
    probe: OptimizerProbe,
) -> Callable[[np.ndarray, bool], np.ndarray]:
    """A function from gradients (one row a step) to updates, from zero weights.

    With `follow` the weights take the updates, otherwise they stay at zero.
    """

    @jax.jit
    def run(gradients, follow):
        def step(carry, gradient):
            weights, state = carry
            update, state = probe.update(
                gradient,
                state,
                weights,
                value=jnp.zeros(()),
                value_fn=lambda _: jnp.zeros(()),
            )
            return (weights + follow * update, state), update

        start = jnp.zeros(probe.size), probe.init()
        return jax.lax.scan(step, start, gradients)[1]

    return lambda gradients, follow: np.asarray(run(gradients, float(follow)))


def _impulse_response_sum(response: np.ndarray) -> tuple[float | None, float]:
    """Sum of a response with a geometric tail, and the ratio of the tail."""
    head, tail = response[0], response[1:]
    if np.all(np.abs(tail) <= 1e-12 * head):
        return _without_rounding(head), 0.0
    if tail[0] == 0:
        return None, 0.0
    pole = tail[1] / tail[0]
    geometric = tail[0] * pole ** np.arange(len(tail))
    if not 0 < pole < 1 or not np.allclose(tail, geometric, rtol=1e-9, atol=0):
        return None, 0.0
    total = head + tail[0] / (1 - pole)
    return _without_rounding(total), _without_rounding(pole)


def _without_rounding(value: float) -> float:
    return float(f"{value:.12g}")


def _is_close(a: np.ndarray, b: np.ndarray, rtol: float = 1e-9) -> bool:
    return bool(np.allclose(a, b, rtol=rtol, atol=rtol * np.abs(a).max()))
