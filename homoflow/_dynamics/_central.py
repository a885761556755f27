"""The flow around which gradient descent oscillates at the edge of stability."""

import math
import warnings
from typing import Any, NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from .._jax._arrays import tree_norm_of_any_size
from .._jax._top_eigenvalues import top_eigenvalues
from .._jax._tracing import is_concrete
from .._laws import Laws
from .._observe._base import AbstractObservable, FunctionOfPoint, Point
from .._observe._sharpness import random_vectors
from .._problem._checks import (
    as_coefficient,
    check_count,
    check_learning_rate,
    check_momentum,
)
from .._problem._problem import Problem
from .._problem._smoothness import kinks_of
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._base import AbstractDynamics
from ._expansion import error_in_descent, start_of_slow_motion
from .edge._curvature import Curvature
from .edge._edge import Edge, Motion, Spectrum, Work

#: Of eigenvectors' residuals, and of the gap in which eigenvalues are at the threshold,
#: where weights alone are known.
_RTOL, _CLOSE = 1e-6, 1e-5
#: Runs with fewer cycles of the oscillation, a larger overshoot at its onset, an
#: oscillation so wide that it moves the edge further, or steps that fall further behind
#: the flow at the start, are warned of.
MIN_CYCLES, MAX_OVERSHOOT, MAX_SHIFT, MAX_LAG = 20, 0.15, 0.005, 0.01


class CentralState(NamedTuple):
    """Weights, what oscillates around them, and integrals along the way.

    - `values`: the largest eigenvalues of ∇²L in falling order, NaN where not known.
    - `oscillation`: X with Σ = UXUᵀ, the columns of U their vectors.
    - `num`: how many eigenvalues are at the threshold.
    - `traces`: tr(AΣ) of every law.
    - `mean_gradient`: the norm of ∇L + ½∇⟨∇²L, Σ⟩.
    - `shift`: by which part of the threshold the curvature between the ends of the
        oscillation is off it.
    - `drift`, `edge_drift`: law by law ∫q(dw/dτ)dτ and ∫2·threshold·tr(AΣ)dτ.
    - `cycles`: how many cycles the oscillation has had.
    """

    weights: PyTree
    values: Float[Array, " rows"]
    oscillation: Float[Array, "critical critical"]
    num: Int[Array, ""]
    traces: dict[str, Array]
    mean_gradient: Float[Array, ""]
    shift: Float[Array, ""]
    drift: dict[str, Array]
    edge_drift: dict[str, Array]
    cycles: Float[Array, ""]


class Rates(NamedTuple):
    """What is integrated along a central flow; see `CentralState`."""

    drift: dict[str, Array]
    edge_drift: dict[str, Array]
    cycles: Float[Array, ""]


class MeanValues(NamedTuple):
    """What gradient descent has in the mean over its oscillation.

    - `losses`: L(w) + ½⟨∇²L, Σ⟩.
    - `grad_norms`: the root of the mean of ‖∇L‖².
    - `laws`: law name → its mean.
    """

    losses: Float[Array, ""]
    grad_norms: Float[Array, ""]
    laws: dict[str, Float[Array, "..."]]


@final
class Central(AbstractDynamics):
    """dw/dτ = −∇L − ½∇_w⟨∇²L, Σ⟩ on {λ_max(∇²L) ≤ 2(1+μ)/η}: the central flow.

    The equation of `homoflow.central_flow`, which says more about it.
    """

    learning_rate: Float[Array, ""] = eqx.field(
        converter=as_coefficient(check_learning_rate)
    )
    momentum: Float[Array, ""] = eqx.field(
        default=0.0, converter=as_coefficient(check_momentum)
    )
    max_critical: int = eqx.field(static=True, default=4)
    order: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        check_count("max_critical", self.max_critical)
        if isinstance(self.order, bool) or self.order not in (1, 2):
            raise ValueError(f"`order` must be 1 or 2; got {self.order!r}.")

    @property
    def name(self) -> str:
        return "central flow"

    @property
    def uses_samples(self) -> bool:
        return False

    @property
    def has_memory(self) -> bool:
        return True

    def obstacle(self, problem: Problem) -> str | None:
        kinks = kinks_of(problem)
        if kinks:
            return (
                f"The gradient jumps at {', '.join(kinks)}: the central flow needs three "
                "derivatives of the loss. Take a smooth model."
            )
        if problem.num_weights < 2:
            return "The central flow of a single weight stands still at the edge."
        return None

    def room(self, problem: Problem) -> int:
        """How many eigenvalues may be at the threshold: not all of them can."""
        return min(self.max_critical, problem.num_weights - 1)

    def num_rows(self, problem: Problem) -> int:
        """How many eigenvalues are followed: one is next, and one is a stray."""
        return min(self.room(problem) + 2, problem.num_weights)

    def edge(self, problem: Problem, rtol: Float[Array, ""]) -> Edge:
        """The set that the flow stays in; `rtol` is of its eigenvectors' residuals."""
        _, unravel = ravel_pytree(problem.weights)
        curvature = Curvature(lambda w: problem.loss(unravel(w)))
        threshold, room = self._threshold(problem), self.room(problem)
        lag = self._lag(problem.dtype) if self.order == 2 else None
        return Edge(curvature, threshold, room, rtol, lag)

    def lag(self, problem: Problem, end: PyTree) -> Float[Array, ""]:
        """How far steps fall behind the flow at its start, of the way to the end.

        To leading order in η̃ they are (η̃/2)∫∇²L∇L dt behind, which is (η̃/2)∇L(w₀) once
        the gradient has died out.
        """
        behind = tree_norm_of_any_size(jax.grad(problem.loss)(problem.weights))
        way = tree_norm_of_any_size(jax.tree.map(jnp.subtract, end, problem.weights))
        half = self._lag(problem.dtype) / 2
        return half * behind / jnp.where(way > 0, way, 1)

    def _lag(self, dtype: jnp.dtype) -> Float[Array, ""]:
        """The learning rate that counts to second order, as in `Modified`."""
        eta, mu = self._coefficients(dtype)
        return eta * (1 + mu) / (1 - mu) ** 2

    def init(self, problem: Problem) -> PyTree:
        """To second order the start of the slow motion that heavy ball settles to."""
        if self.order == 1:
            return problem.weights
        return start_of_slow_motion(problem, *self._coefficients(problem.dtype))

    def _threshold(self, problem: Problem) -> Float[Array, ""]:
        eta, mu = self._coefficients(problem.dtype)
        return 2 * (1 + mu) / eta

    def _coefficients(self, dtype: jnp.dtype) -> tuple[Array, Array]:
        return jnp.asarray(self.learning_rate, dtype), jnp.asarray(self.momentum, dtype)

    @property
    def has_edge(self) -> bool:
        return True

    def velocity(self, problem: Problem, t: Float[Array, ""], state: PyTree) -> PyTree:
        """The part of −∇L along which no eigenvalue at the threshold rises."""
        del t
        w, unravel = ravel_pytree(state)
        edge = self.edge(problem, jnp.asarray(_RTOL, w.dtype))
        gradient, product = edge.curvature.linearize(w)
        guess = random_vectors(state, self.num_rows(problem))
        found = top_eigenvalues(product, guess, _RTOL)
        spectrum = Spectrum(found.values, found.vectors, found.residuals)
        near = jnp.sum(found.values >= edge.threshold * (1 - _CLOSE))
        work = Work.none()
        _, pull, work = edge.pull(w, work)
        held, velocity, work = edge.weigh(w, pull, spectrum, near, 0.0, work)
        if edge.lag is None:
            return unravel(velocity)
        num = jnp.linalg.matrix_rank(held, rtol=_CLOSE)
        motion, work = edge.motion(w, gradient, spectrum, num, work)
        return unravel(edge.with_lag(w, motion, num, work)[0].velocity)

    def rates(self, problem: Problem, laws: Laws, motion: Motion) -> Rates:
        """What is integrated along the flow beside its weights."""
        _, unravel = ravel_pytree(problem.weights)
        velocity = unravel(motion.velocity)
        threshold = self._threshold(problem)
        at_edge = {
            name: 2 * threshold * trace
            for name, trace in self.traces(problem, laws, motion).items()
        }
        drift = {law.name: law.quadratic(velocity) for law in laws}
        oscillates = jnp.trace(motion.oscillation) > 0
        rise = jnp.where(oscillates, jnp.maximum(motion.rise, 0), 0)
        pace = jnp.sqrt(2 * rise) / (2 * math.pi)
        return Rates(drift, at_edge, pace)

    def traces(
        self, problem: Problem, laws: Laws, motion: Motion
    ) -> dict[str, Float[Array, "..."]]:
        """tr(AΣ) of every law: what the oscillation adds to its mean."""
        _, unravel = ravel_pytree(problem.weights)
        variances, rotation = jnp.linalg.eigh(motion.oscillation)
        vectors = rotation.T @ motion.spectrum.vectors[: self.room(problem)]

        def add(total: dict[str, Array], pair: tuple[Array, Array]):
            variance, vector = pair
            direction = unravel(vector)
            for law in laws:
                share = variance * law.quadratic(direction)
                total[law.name] = total[law.name] + share
            return total, None

        zeros = jax.eval_shape(laws.values, problem.weights)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), zeros)
        return jax.lax.scan(add, zeros, (variances, vectors))[0]

    def observables(self, laws: Laws) -> dict[str, AbstractObservable]:
        mean = _Mean(laws, self)
        return {
            "spectrum": FunctionOfPoint(function=_spectrum),
            "oscillation": FunctionOfPoint(function=_variances),
            "critical": FunctionOfPoint(function=_num_critical),
            "mean": FunctionOfPoint(function=mean),
            "edge_drift": FunctionOfPoint(function=_edge_drift),
            "mean_square": FunctionOfPoint(function=_mean_square),
            "cycles": FunctionOfPoint(function=_cycles),
            "shift": FunctionOfPoint(function=_shift),
        }

    def input_error(self) -> RESULTS:
        return error_in_descent(self.learning_rate, self.momentum)

    def stats(
        self, numbers: dict[str, Array], observed: dict[str, Any]
    ) -> dict[str, Array]:
        del numbers
        return {"edge_cycles": observed["cycles"][-1]}

    def warn(self, trajectory: Trajectory) -> None:
        """Warn where descent is not expected to oscillate around this flow."""
        stats = trajectory.stats
        names = "events", "cycles", "overshoot", "shift", "lag"
        figures = [stats[f"edge_{name}"] for name in names]
        if not is_concrete((figures, self.momentum)) or np.ndim(figures[0]):
            return
        events, cycles, overshoot, shift, lag = (float(np.asarray(f)) for f in figures)
        is_expanded = self.order == 2 and not lag <= MAX_LAG
        if events == 0 and not is_expanded:
            return
        # The oscillation grows by the excess times the length of a step.
        mu = float(self.momentum)
        growth = overshoot * (1 + mu) / (1 - mu)
        doubts = []
        if events and not cycles >= MIN_CYCLES:
            doubts.append(
                f"the oscillation has had {cycles:.2g} cycles (at least {MIN_CYCLES} are "
                "needed for its mean to be this flow)"
            )
        if not overshoot <= MAX_OVERSHOOT:
            doubts.append(
                f"the sharpness is expected to overshoot by {overshoot:.3g} of the "
                f"threshold when the oscillation sets in (at most {MAX_OVERSHOOT})"
            )
        if overshoot <= MAX_OVERSHOOT < growth:
            doubts.append(
                f"with momentum {mu:g} the oscillation is expected to grow by "
                f"{2 * growth:.2g} in a step when it sets in (at most {2 * MAX_OVERSHOOT})"
            )
        if not lag <= MAX_LAG:
            doubts.append(
                f"at the start the steps fall behind the flow by {lag:.2g} of the way that "
                f"the weights go (at most {MAX_LAG})"
            )
        if not shift <= MAX_SHIFT:
            doubts.append(
                f"the oscillation is so wide that the curvature between its ends is off "
                f"the threshold by {shift:.2g} of it (at most {MAX_SHIFT})"
            )
        if doubts:
            warnings.warn(
                "Gradient descent may not follow this central flow: "
                f"{', and '.join(doubts)}. Compare with `homoflow.descend`.",
                stacklevel=4,
            )


@final
class _Mean(eqx.Module):
    """The mean of losses, gradient norms and laws over the oscillation."""

    laws: Laws
    dynamics: Central

    def __call__(self, point: Point) -> MeanValues:
        state: CentralState = point.state
        problem, dynamics = point.problem, self.dynamics
        threshold = dynamics._threshold(problem)
        total = jnp.trace(state.oscillation)
        # To first order the flow lacks what each step adds to a law, η²q(∇L).
        factor = dynamics._lag(problem.dtype) if dynamics.order == 1 else 0
        laws = jax.tree.map(
            lambda value, drift, trace: value + factor * drift + trace,
            self.laws.values(point.weights),
            state.drift,
            state.traces,
        )
        return MeanValues(
            point.loss + threshold * total / 2,
            jnp.sqrt(state.mean_gradient**2 + threshold**2 * total),
            laws,
        )


def _variances(point: Point) -> Float[Array, " critical"]:
    return jnp.linalg.eigvalsh(point.state.oscillation)[::-1]


def _spectrum(point: Point) -> Float[Array, " rows"]:
    return point.state.values


def _num_critical(point: Point) -> Int[Array, ""]:
    return point.state.num


def _edge_drift(point: Point) -> dict[str, Float[Array, "..."]]:
    return point.state.edge_drift


def _mean_square(point: Point) -> dict[str, Float[Array, "..."]]:
    return point.state.drift


def _shift(point: Point) -> Float[Array, ""]:
    return point.state.shift


def _cycles(point: Point) -> Float[Array, ""]:
    return point.state.cycles
