"""`heavy_ball_flow`: gradient descent with momentum, as a ball with mass and friction."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, final

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._dynamics._base import AbstractDynamics
from .._jax._arrays import tree_norm
from .._jax._progress import Progress
from .._jax._tracing import is_concrete
from .._laws import Law, Rotation, rotations_of, torque
from .._methods._diffrax import diffrax_flow
from .._methods._diffrax_options import choose_method
from .._observe._time_grid import checked_span
from .._problem._checks import (
    as_scalar,
    check_learning_rate,
    check_mass,
    check_max_steps,
    check_momentum,
)
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, Problem, pose
from .._problem._trainable import Trainable
from .._results._failure import raise_unless_successful
from .._results._status import RESULTS
from .._results._trajectory import Trajectory

Number = float | int | Float[ArrayLike, ""]


def heavy_ball_flow(
    model: PyTree,
    data: PyTree,
    t1: float | int | Float[ArrayLike, ""],
    *,
    mass: Number | None = None,
    velocity: PyTree | None = None,
    learning_rate: Number | None = None,
    momentum: Number | None = None,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    ts: Float[ArrayLike, " times"] | Iterable[float] | None = None,
    rtol: float | Float[ArrayLike, ""] | None = None,
    atol: float | Float[ArrayLike, ""] | None = None,
    solver: dfx.AbstractSolver | None = None,
    stepsize_controller: dfx.AbstractStepSizeController | None = None,
    dt0: float | Float[ArrayLike, ""] | None = None,
    laws: Iterable[Law] | None = None,
    save_models: bool = False,
    adjoint: dfx.AbstractAdjoint | None = None,
    estimate_error: bool | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    progress: Progress = False,
) -> Trajectory:
    """The flow of a heavy ball: m·d²w/dt² + dw/dt = −∇L(w) [Polyak 1964].

    Friction is 1, so that time is the flow's: as the mass m → 0 it becomes the gradient
    flow. Gradient descent with momentum μ (v ← μv + ∇L, w ← w − ηv) is its discretization
    by central differences with steps of time h = η/(1−μ), for a mass of
    m = h(1+μ)/(2(1−μ)). From rest, v = 0, it starts as this flow does with
    dw/dt(0) = −(1−μ)/(1+μ)·∇L. With these two it differs from the flow by O(h²), at a
    fixed mass and at a fixed momentum.

    What is conserved: the balance laws of gradient flow are not. A law D = wᵀAw has
    m·D̈ + Ḋ = 2m·q(ẇ) with q(v) = vᵀAv. But where units only meet linear maps they can be
    rotated, and each rotation has a charge that only friction takes away: the skew matrix

        R = W₁Ẇ₁ᵀ − Ẇ₁W₁ᵀ + W₂ᵀẆ₂ − Ẇ₂ᵀW₂,   e^{t/m}·R = constant

    [Noether's theorem; Marcotte, Gribonval & Peyré 2024]. ReLU units have none. R is 0
    for ever if the ball starts from rest or along the gradient; give a `velocity` to
    see it.

    **Arguments:**

    - `mass`: m, a positive time. The cost grows as t1/m when it is small.
    - `velocity`: dw/dt at t = 0, a pytree like `model` with a velocity in place of every
        trained array (others are ignored). Default: at rest.
    - `learning_rate`, `momentum`: instead of `mass` and `velocity`, those of the descent
        to follow; η > 0 and 0 ≤ μ < 1.
    - all others: as for `homoflow.flow`. At kinks (ReLU) the default method averages, as
        there.

    **Returns:** a `homoflow.Trajectory`. Its `laws` are those of gradient flow, and next
    to each matrix law, such as `matrix[1]`, the charge `rotations[1]`, shape
    `(times, n, n)`: R as it is, which decays as e^{−t/m}. `stats["law_violation"]` also
    certifies the symmetry of L behind R. `stats["mass"]` is m.

    **Raises:** `ValueError` for bad input; `homoflow.TrajectoryError`, which holds what
    was computed, if the run does not finish.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    push = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(2))
    ball = hf.heavy_ball_flow(model, (x, x[:, :1]), t1=2.0, mass=0.5, velocity=push)
    growth = jnp.exp(ball.ts / 0.5)[:, None, None]
    constant = growth * ball.laws["rotations[1]"]
    ```
    """
    problem = pose(
        model,
        data,
        loss=loss,
        objective=objective,
        trainable=trainable,
        laws=laws,
    )
    span = checked_span(t1, ts, problem.dtype)
    check_max_steps(max_steps)
    dynamics = _dynamics(problem, mass, velocity, learning_rate, momentum)
    method = choose_method(
        problem,
        rtol=rtol,
        atol=atol,
        solver=solver,
        controller=stepsize_controller,
        dt0=dt0,
        max_steps=max_steps,
    )
    trajectory, watched, _ = diffrax_flow(
        problem,
        span,
        method,
        dynamics=dynamics,
        max_steps=max_steps,
        save_models=save_models,
        adjoint=adjoint,
        estimate_error=estimate_error,
        progress=progress,
    )
    trajectory = _with_charges(trajectory, watched, dynamics.mass)
    return raise_unless_successful(trajectory) if throw else trajectory


class _State(NamedTuple):
    """Weights, and m·dw/dt, which is as large as weights."""

    weights: PyTree
    impulse: PyTree


class _Watched(NamedTuple):
    charges: dict[str, Array]
    violation: Float[Array, ""]


@final
class HeavyBallFlow(AbstractDynamics):
    """m·d²w/dt² + dw/dt = −∇L(w), from `velocity` + `push`·∇L(w₀)."""

    mass: Float[Array, ""]
    push: Float[Array, ""]
    velocity_at_start: PyTree
    rotations: tuple[Rotation, ...]

    @property
    def name(self) -> str:
        return "heavy-ball flow"

    def start(self, problem: Problem, weights: PyTree) -> _State:
        gradient = jax.grad(problem.loss)(weights)
        impulse = jax.tree.map(
            lambda v, g: self.mass * (v + self.push * g),
            self.velocity_at_start,
            gradient,
        )
        return _State(weights, impulse)

    def weights(self, state: _State) -> PyTree:
        return state.weights

    def velocity(self, problem: Problem, state: _State) -> _State:
        gradient = jax.grad(problem.loss)(state.weights)
        moving = jax.tree.map(lambda p: p / self.mass, state.impulse)
        force = jax.tree.map(lambda g, v: -g - v, gradient, moving)
        return _State(moving, force)

    def watch(self, problem: Problem, state: _State) -> _Watched:
        w = state.weights
        moving = jax.tree.map(lambda p: p / self.mass, state.impulse)
        charges = {r.name: r.value(w, moving) for r in self.rotations}
        if not self.rotations:
            return _Watched(charges, jnp.zeros_like(self.mass))
        gradient = jax.grad(problem.loss)(w)
        scale = 2 * tree_norm(w) * tree_norm(gradient)
        violation = torque(self.rotations, w, gradient) / jnp.where(scale > 0, scale, 1)
        return _Watched(charges, violation)

    def fault(self) -> RESULTS:
        good = jnp.isfinite(self.mass) & (self.mass > 0) & jnp.isfinite(self.push)
        return RESULTS.where(good, RESULTS.successful, RESULTS.bad_coefficient)


def _dynamics(
    problem: Problem, mass: Any, velocity: Any, learning_rate: Any, momentum: Any
) -> HeavyBallFlow:
    """The equation that a user's arguments describe."""
    both = learning_rate is not None and momentum is not None
    neither = learning_rate is None and momentum is None
    if not ((mass is None and both) or (mass is not None and neither)):
        raise ValueError(
            "Give either `mass`, or both `learning_rate` and `momentum`, which determine "
            "the mass."
        )
    rotations = rotations_of(problem.laws)
    rest = jax.tree.map(jnp.zeros_like, problem.weights)
    dtype = problem.dtype
    if mass is not None:
        check_mass(mass)
        at_start = rest if velocity is None else _checked_velocity(problem, velocity)
        m, zero = as_scalar(mass, dtype), jnp.zeros((), dtype)
        assert m is not None
        return HeavyBallFlow(m, zero, at_start, rotations)
    if velocity is not None:
        raise ValueError(
            "`velocity` goes with `mass`: descent with momentum starts from rest."
        )
    check_learning_rate(learning_rate)
    check_momentum(momentum)
    eta, mu = jnp.asarray(learning_rate, dtype), jnp.asarray(momentum, dtype)
    # Out of range under a trace, it must not turn out as a mass that makes sense.
    mu = jnp.where((mu >= 0) & (mu < 1), mu, jnp.nan)
    push = -(1 - mu) / (1 + mu)
    return HeavyBallFlow(eta * (1 + mu) / (2 * (1 - mu) ** 2), push, rest, rotations)


def _checked_velocity(problem: Problem, velocity: PyTree) -> PyTree:
    weights = problem.weights
    try:
        chosen = eqx.filter(velocity, problem.mask)
    except ValueError:
        chosen = None
    places = jax.tree_util.tree_leaves_with_path(chosen)
    wanted = jax.tree_util.tree_leaves_with_path(weights)
    shapes, wanted_shapes = (
        {path: jnp.shape(leaf) for path, leaf in leaves} for leaves in (places, wanted)
    )
    if shapes != wanted_shapes:
        raise ValueError(
            "`velocity` must be a pytree like `model`, with an array of the same shape in "
            "place of every trained one."
        )
    arrays = [jnp.asarray(leaf, problem.dtype) for _, leaf in places]
    if is_concrete(arrays) and not all(bool(jnp.all(jnp.isfinite(a))) for a in arrays):
        raise ValueError("`velocity` contains NaN or inf.")
    return jax.tree.unflatten(jax.tree.structure(weights), arrays)


def _with_charges(trajectory: Trajectory, watched: _Watched, mass: Array) -> Trajectory:
    worst = jnp.max(jnp.nan_to_num(watched.violation))
    violation = jnp.maximum(trajectory.stats["law_violation"], worst)
    return dataclasses.replace(
        trajectory,
        laws={**trajectory.laws, **watched.charges},
        stats=trajectory.stats.with_numbers(law_violation=violation, mass=mass),
    )
