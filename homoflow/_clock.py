"""The flow's clock in gradient descent: how much flow time one step takes.

A step of gradient descent with learning rate η takes time η; with momentum μ the
velocity settles at 1/(1−μ) times the gradient, and a step takes η/(1−μ). Which of these
holds is measured by feeding the optimizer an impulse, not guessed from its name: a
factory may be anything.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

_STEPS = 6


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
        return f"flow time. {self.note}" if self.note else "flow time"


def read_clock(make_optimizer, weights: PyTree) -> Clock:
    """The clock of `make_optimizer(1.0)` on weights of this structure.

    The optimizer is run on a unit impulse of gradient at zero weights. A linear filter
    with one pole μ answers with a geometric tail, whose sum is the gain.
    """
    with jax.ensure_compile_time_eval(), jax.numpy_dtype_promotion("standard"):
        optimizer = make_optimizer(1.0)
        small, tiny, large = (
            _impulse_response(optimizer, weights, size) for size in (1e-6, 1e-9, 1e6)
        )
    return _clock_from(small, tiny, large)


def _clock_from(small: np.ndarray, tiny: np.ndarray, large: np.ndarray) -> Clock:
    if not _same(small, tiny) or not np.isfinite(small).all() or small[0] <= 0:
        return Clock(
            1.0,
            False,
            "Steps are not proportional to the gradient (as in Adam): there is no "
            "gradient-flow limit, and this clock only adds up learning rates.",
        )
    gain, pole = _geometric_sum(small)
    if gain is None:
        return Clock(
            1.0,
            False,
            "The optimizer's memory is not that of heavy-ball or Nesterov momentum: its "
            "clock is not known, and this one only adds up learning rates.",
        )
    notes = []
    if pole:
        notes.append(f"Momentum {pole:.4g}: a step of η takes time {gain:.4g} η.")
    elif abs(gain - 1) > 1e-6:
        notes.append(f"A step of η takes time {gain:.4g} η.")
    if not _same(small, large):
        notes.append(
            "Large gradients are cut (clipping): it is the flow's clock only while "
            "nothing is cut."
        )
    return Clock(gain, True, " ".join(notes))


def _impulse_response(
    optimizer: optax.GradientTransformation, weights: PyTree, size: float
) -> np.ndarray:
    """Steps along the negative gradient, per unit of gradient, after one impulse."""
    params = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    impulse = jax.tree.map(lambda w: jnp.full(w.shape, size, jnp.float32), weights)
    silence = jax.tree.map(jnp.zeros_like, impulse)
    optimizer = optax.with_extra_args_support(optimizer)
    state = optimizer.init(params)
    answers = []
    for step in range(_STEPS):
        gradient = impulse if step == 0 else silence
        # Parameters stay at zero, so that weight decay adds nothing.
        update, state = optimizer.update(
            gradient, state, params, value=jnp.float32(0), grad=gradient,
            value_fn=lambda _: jnp.float32(0),
        )  # fmt: skip
        leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(update)]
        answers.append(-np.mean(np.concatenate(leaves)) / size)
    return np.array(answers)


def _geometric_sum(response: np.ndarray) -> tuple[float | None, float]:
    """Sum of a response with a geometric tail, and the ratio of the tail."""
    head, tail = response[0], response[1:]
    if np.all(np.abs(tail) <= 1e-6 * head):
        return float(head), 0.0
    if tail[0] == 0:
        return None, 0.0
    pole = tail[1] / tail[0]
    geometric = tail[0] * pole ** np.arange(len(tail))
    if not 0 < pole < 1 or not np.allclose(tail, geometric, rtol=1e-4, atol=0):
        return None, 0.0
    return float(head + tail[0] / (1 - pole)), float(pole)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.allclose(a, b, rtol=1e-4, atol=1e-6 * abs(a[0])))
