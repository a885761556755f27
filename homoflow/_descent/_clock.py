"""The flow's clock in gradient descent: how much flow time one step takes.

A step of gradient descent with learning rate η takes time η; with momentum μ the
velocity settles at 1/(1−μ) times the gradient, and a step takes η/(1−μ). Which of these
holds is measured by feeding the optimizer an impulse, not guessed from its name: a
factory may be anything.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

_STEPS = 6
_SMALL = 2.0**-10


class Clock(eqx.Module):
    """Flow time per step, in units of the learning rate, and what that rests on.

    - `gain`: 1 for gradient descent, 1/(1−μ) with momentum.
    - `has_limit`: whether the method follows gradient flow as the learning rate → 0.
    - `note`: one sentence, empty for plain gradient descent.
    """

    gain: float = eqx.field(static=True)
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
    gain; if it is not, no rescaling of time makes its small steps follow the flow.
    """
    leaves, structure = jax.tree.flatten(weights)
    # An optimizer may tell weights apart by their place and rank, not by their size.
    shapes = tuple(tuple(min(n, 2) for n in leaf.shape) for leaf in leaves)
    return _read(make_optimizer, structure, shapes)


@functools.lru_cache(maxsize=256)
def _read(make_optimizer: Callable, structure, shapes: tuple) -> Clock:
    # Double precision, whatever the run's own: 1/(1−μ) magnifies rounding.
    with (
        jax.ensure_compile_time_eval(),
        jax.numpy_dtype_promotion("standard"),
        jax.enable_x64(True),
    ):
        weights = jax.tree.unflatten(structure, [jnp.zeros(s) for s in shapes])
        respond = _responder(make_optimizer, weights)
        return _clock_of(respond, sum(w.size for w in jax.tree.leaves(weights)))


def _clock_of(respond: Callable, size: int) -> Clock:
    one, two = _SMALL * np.random.default_rng(0).standard_normal((2, _STEPS, size))
    separately = respond(one, True) + respond(two, True)
    if not _same(separately, respond(one + two, True)):
        return _without_limit(
            "steps are not a linear function of the gradients (as in Adam), so there is "
            "no gradient-flow limit."
        )
    impulse = np.zeros((_STEPS, size))
    impulse[0] = 1
    small, large = _SMALL * impulse, impulse / _SMALL
    response = -respond(small, False) / _SMALL
    if not _same(response, response[:, :1]):
        return _without_limit(
            "weights move at different rates, so the limit is a preconditioned flow."
        )
    gain, pole = _geometric_sum(response[:, 0])
    if gain is None or gain <= 0:
        return _without_limit(
            "the optimizer's memory is not that of heavy-ball or Nesterov momentum."
        )
    notes = []
    if pole or gain != 1:
        reason = f"momentum {pole:g}, " if pole else ""
        notes.append(f"{reason}a step of η takes time {gain:g} η.")
    if not _same(response, -respond(large, False) * _SMALL):
        notes.append("large gradients are cut (clipping), and then it is not.")
    if not _same(response, -respond(small, True) / _SMALL):
        notes.append("weights decay, so the limit is the flow with weight decay.")
    return Clock(gain, True, " ".join(notes))


def _without_limit(note: str) -> Clock:
    return Clock(1.0, False, note)


def _responder(make_optimizer: Callable, weights: PyTree) -> Callable:
    """A function from gradients (one row a step) to updates, from zero weights.

    With `follow` the weights take the updates, otherwise they stay at zero.
    """
    start, unravel = jax.flatten_util.ravel_pytree(weights)

    @jax.jit
    def respond(gradients, follow):
        optimizer = optax.with_extra_args_support(make_optimizer(1.0))

        def step(carry, row):
            params, state = carry
            update, state = optimizer.update(
                unravel(row), state, unravel(params), value=jnp.zeros(()),
                grad=unravel(row), value_fn=lambda _: jnp.zeros(()),
            )  # fmt: skip
            flat = jax.flatten_util.ravel_pytree(update)[0]
            return (params + follow * flat, state), flat

        return jax.lax.scan(step, (start, optimizer.init(weights)), gradients)[1]

    return lambda gradients, follow: np.asarray(respond(gradients, float(follow)))


def _geometric_sum(response: np.ndarray) -> tuple[float | None, float]:
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
    gain = head + tail[0] / (1 - pole)
    return _without_rounding(gain), _without_rounding(pole)


def _without_rounding(value: float) -> float:
    return float(f"{value:.12g}")


def _same(a: np.ndarray, b: np.ndarray, rtol: float = 1e-9) -> bool:
    return bool(np.allclose(a, b, rtol=rtol, atol=rtol * np.abs(a).max()))
