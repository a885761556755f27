"""What moves weights in continuous time: differential equations for Diffrax to solve."""

import abc
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._problem._problem import Problem
from .._results._status import RESULTS

State = PyTree


class AbstractDynamics(eqx.Module):
    """An ordinary differential equation that moves the weights of a problem.

    Its state is a pytree of arrays, all of which should be of the size of weights: one
    absolute tolerance holds for them. The problem that the methods are given knows
    everything but the trained weights.
    """

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What to call it in `stats`; empty for the gradient flow itself."""

    @abc.abstractmethod
    def start(self, problem: Problem, weights: PyTree) -> State:
        """The state at t = 0."""

    @abc.abstractmethod
    def weights(self, state: State) -> PyTree:
        """The weights in a state."""

    @abc.abstractmethod
    def velocity(self, problem: Problem, state: State) -> State:
        """d(state)/dt."""

    @abc.abstractmethod
    def watch(self, problem: Problem, state: State) -> Any:
        """What is recorded beside the loss, laws and norms; `None` for nothing."""

    @abc.abstractmethod
    def fault(self) -> RESULTS:
        """What is wrong with the equation's own numbers, where they are traced."""


@final
class GradientFlow(AbstractDynamics):
    """dw/dt = −∇L(w), or −∇L(w) − λw with a `weight_decay` λ."""

    weight_decay: Float[Array, ""] | None = None

    @property
    def name(self) -> str:
        return "" if self.weight_decay is None else "gradient flow with weight decay"

    def start(self, problem: Problem, weights: PyTree) -> State:
        del problem
        return weights

    def weights(self, state: State) -> PyTree:
        return state

    def velocity(self, problem: Problem, state: State) -> State:
        gradient = jax.grad(problem.loss)(state)
        if self.weight_decay is None:
            return jax.tree.map(jnp.negative, gradient)
        return jax.tree.map(lambda g, w: -g - self.weight_decay * w, gradient, state)

    def watch(self, problem: Problem, state: State) -> None:
        del problem, state

    def fault(self) -> RESULTS:
        if self.weight_decay is None:
            return RESULTS.successful
        good = jnp.isfinite(self.weight_decay) & (self.weight_decay >= 0)
        return RESULTS.where(good, RESULTS.successful, RESULTS.bad_coefficient)
