"""What moves weights in continuous time: differential equations for a method to solve."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._laws import Laws
from .._observe._base import AbstractObservable
from .._problem._problem import Problem
from .._results._status import RESULTS
from .._results._trajectory import Trajectory

State = PyTree


class Descent(eqx.Module):
    """dw/dt = −pace(t, Φ) ∇Φ(w): the curve along which L falls too, with another speed.

    - `objective(predictions, targets)` of all samples: Φ, an increasing function of L.
    - `pace(t, value)`: a positive factor, from the time and the value of Φ.
    - `loss(value)`: L from the value of Φ.
    """

    objective: Callable[[PyTree, PyTree], Array]
    pace: Callable[[Array, Array], Array]
    loss: Callable[[Array], Array]

    def from_time(self, t0: Array | None) -> "Descent":
        """The same where times count from t0."""
        return (
            self
            if t0 is None
            else Descent(self.objective, _Later(self.pace, t0), self.loss)
        )


class _Later(eqx.Module):
    """A pace whose times count from t0."""

    pace: Callable[[Array, Array], Array]
    t0: Float[Array, ""]

    def __call__(self, t: Array, value: Array) -> Array:
        return self.pace(self.t0 + t, value)


class AbstractDynamics(eqx.Module):
    """An ordinary differential equation that moves the weights of a problem.

    A subclass has to say what the `velocity` is. It may say more, where the defaults do
    not hold: a state that is more than the weights (`init`, `weights`), what to record
    (`observables`, `stats`), whether the laws of gradient flow hold (`conserves_laws`).

    The state is a pytree of arrays, all of which should be of the size of weights: one
    absolute tolerance holds for them. Numbers of the equation are fields, as arrays:
    then a new value compiles nothing.

    ```python
    class SignFlow(hf.AbstractDynamics):
        def velocity(self, problem, t, state):
            return jax.tree.map(lambda g: -jnp.tanh(g), jax.grad(problem.loss)(state))

    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    run = hf.flow(model, (x, x[:, :1]), 1.0, dynamics=SignFlow())
    ```
    """

    @property
    def name(self) -> str:
        """What to call it in `stats`."""
        return type(self).__name__

    @property
    def is_gradient_flow(self) -> bool:
        """Whether it is dw/dt = −∇L(w), perhaps with weight decay, and nothing else.

        Only then may a method take a solver that is made for gradient flows.
        """
        return False

    @property
    def conserves_laws(self) -> bool:
        """Whether the laws of gradient flow hold, so that projection may restore them."""
        return False

    @property
    def uses_samples(self) -> bool:
        """Whether more than L and its derivatives is computed from the data.

        If not, a method may exchange the samples for fewer ones with the same L.
        """
        return True

    @property
    def stays_stiff(self) -> bool:
        """Whether fast directions never die out, so that a dense Jacobian pays where
        weights are few."""
        return False

    @property
    def has_memory(self) -> bool:
        """Whether weights alone do not say how a run goes on."""
        return type(self).init is not AbstractDynamics.init

    @property
    def has_edge(self) -> bool:
        """Whether the weights stay in a set with corners, and slide along its boundary.

        A general solver would step across it.
        """
        return False

    def check(self, problem: Problem) -> None:
        """Raise `ValueError` where the equation's own numbers make no sense."""
        del problem

    def obstacle(self, problem: Problem) -> str | None:
        """Why the equation makes no sense for a problem, or `None`.

        A user who passes a solver is believed to know better.
        """
        del problem
        return None

    def input_error(self) -> RESULTS:
        """What is wrong with the equation's own numbers, where they are traced."""
        return RESULTS.successful

    def init(self, problem: Problem) -> State:
        """The state at the start."""
        return problem.weights

    def weights(self, state: State) -> PyTree:
        """The weights in a state."""
        return state

    def weights_velocity(self, state: State, velocity: State) -> PyTree:
        """dw/dt at a state, from that of the state.

        Where the weights are a part of the state, it is that part of the velocity.
        """
        del state
        return self.weights(velocity)

    @abc.abstractmethod
    def velocity(self, problem: Problem, t: Float[Array, ""], state: State) -> State:
        """d(state)/dt.

        The problem's own `weights` are not there: they are in the state.
        """

    def descent(self, problem: Problem) -> Descent | None:
        """What falls in place of L, and how fast, where the equation is gradient flow
        with another speed.

        A method that follows each kink needs to know no more of it.
        """
        del problem
        return None

    def clock(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """The time on the flow's clock, where the equation is solved in another variable.

        Everything that is recorded is on the clock, velocities too.
        """
        return t

    def observables(self, laws: Laws) -> dict[str, AbstractObservable]:
        """What is recorded beside the loss, laws and norms, or in place of them."""
        del laws
        return {}

    def stats(
        self, numbers: dict[str, Array], observed: dict[str, Any]
    ) -> dict[str, Array]:
        """Numbers for `stats`, from those there and from what was recorded."""
        del numbers, observed
        return {}

    def error_figures(
        self, observed: dict[str, Any], coarse: dict[str, Any]
    ) -> dict[str, Array]:
        """Numbers for `stats` from what two solves recorded, the second a coarser one."""
        del observed, coarse
        return {}

    def warn(self, trajectory: Trajectory) -> None:
        """Warn where a run shows that the equation does not mean what it is used for."""
        del trajectory


class AbstractStochasticDynamics(AbstractDynamics):
    """A stochastic differential equation d(state) = velocity·dt + noise∘dB.

    `noise` is the factor of each component of the state: a pytree like the state. Solve
    it with one of Diffrax's solvers for stochastic equations, and a constant step:

    ```python
    class Langevin(hf.AbstractStochasticDynamics):
        temperature: jax.Array
        key: jax.Array

        def velocity(self, problem, t, state):
            return jax.tree.map(jnp.negative, jax.grad(problem.loss)(state))

        def noise(self, problem, t, state):
            factor = jnp.sqrt(2 * self.temperature)
            return jax.tree.map(lambda w: jnp.full_like(w, factor), state)

    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    dynamics = Langevin(jnp.asarray(1e-3), jax.random.key(2))
    run = hf.flow(
        model,
        (x, x[:, :1]),
        1.0,
        dynamics=dynamics,
        solver=diffrax.EulerHeun(),
        dt0=0.05,
    )
    ```
    """

    key: eqx.AbstractVar[PRNGKeyArray]

    @abc.abstractmethod
    def noise(self, problem: Problem, t: Float[Array, ""], state: State) -> State:
        """The factor of dB, component by component."""
