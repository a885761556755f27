"""What an observable is: a function of a point of a run."""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._problem._problem import Problem

Carry = PyTree


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a run, as an observable sees it while it is recorded.

    - `t`: its time, on the flow's clock.
    - `problem`: what is minimized, with the data as they were given.
    - `weights`: the trained arrays, a model with `None` in place of everything else.
    - `loss`, `gradient`: L and ∇L there, the gradient a pytree like `weights`. Along the
        exact flow of a model with kinks, −dw/dt stands for the gradient.
    - `state`: of the dynamics; the weights themselves for a gradient flow.
    - `memory`: the optimizer's state in a descent, before the step that starts there;
        `None` in a flow.
    - `model`, `velocity`: computed when they are asked for.
    """

    t: Float[Array, ""]
    problem: Problem
    weights: PyTree
    loss: Float[Array, ""]
    gradient: PyTree
    state: PyTree
    compute_velocity: Callable[[], PyTree] = dataclasses.field(repr=False)
    memory: PyTree = None

    @property
    def model(self) -> PyTree:
        """The whole model at this point."""
        return self.problem.model_at(self.weights)

    @property
    def velocity(self) -> PyTree:
        """dw/dt by the run's dynamics; −∇L for gradient descent."""
        return self.compute_velocity()


class AbstractObservable(eqx.Module):
    """A quantity recorded along a run, with something handed on between its times.

    A plain function of a `Point` will do where nothing is handed on. Otherwise:

    - `every`: record at every so manieth of the run's times, from the first on.
    - `init(point)`: what the first time starts from.
    - `__call__(point, carry)`: the value there, an array or a pytree of arrays, and what
        the next recorded time starts from.

    - `pass_by(point, carry)`: what is handed on past a time at which nothing is recorded,
        the same carry if it is not there.
    - `follows_steps`: whether it makes sense along the steps of a descent only, each of
        which is a time of the run then.
    - `is_sequential`: whether the value depends on what the times in between handed on.
        If not, what is handed on may be that of the run's start at any time. Where a run's
        states are too many to keep (more than 2²⁰ numbers) only such observables can be
        recorded.

    ```python
    class Distance(hf.observe.AbstractObservable):
        every: int = 1

        @property
        def is_sequential(self):
            return False

        def init(self, point):
            return point.weights

        def __call__(self, point, start):
            moved = jax.tree.map(jnp.subtract, point.weights, start)
            return optax.tree.norm(moved), start
    ```
    """

    every: eqx.AbstractVar[int]

    @property
    def is_sequential(self) -> bool:
        """Whether the value depends on what the times before handed on."""
        return True

    @property
    def follows_steps(self) -> bool:
        """Whether every step of a descent has to be a time of the run."""
        return False

    def pass_by(self, point: Point, carry: Carry) -> Carry:
        """What is handed on past a time at which nothing is recorded."""
        del point
        return carry

    @abc.abstractmethod
    def init(self, point: Point) -> Carry:
        """What the first recorded time starts from."""

    @abc.abstractmethod
    def __call__(self, point: Point, carry: Carry) -> tuple[PyTree, Carry]:
        """The value at a point, and what the next recorded time starts from."""


@final
class FunctionOfPoint(AbstractObservable):
    """A plain function of a point, recorded at every time."""

    function: Callable[[Point], PyTree]
    every: int = eqx.field(static=True, default=1)

    @property
    def is_sequential(self) -> bool:
        return False

    def init(self, point: Point) -> None:
        del point

    def __call__(self, point: Point, carry: None) -> tuple[PyTree, None]:
        return self.function(point), carry


Observables = Mapping[str, AbstractObservable | Callable[[Point], Any]]


def as_observables(
    observe: Observables | None, reserved: frozenset[str], *, has_steps: bool = False
) -> dict[str, AbstractObservable]:
    """What a user asks to observe, or an error that says what is wrong with it.

    `has_steps`: whether the run is a descent of which every step is recorded.
    """
    if observe is None:
        return {}
    if not isinstance(observe, Mapping):
        raise TypeError(
            "`observe` must be a dictionary from names to functions of a "
            f"`homoflow.observe.Point`; got {type(observe).__name__}."
        )
    checked = {}
    for name, what in observe.items():
        if not isinstance(name, str):
            raise TypeError(f"Names in `observe` must be strings; got {name!r}.")
        if name in reserved:
            raise ValueError(
                f"{name!r} is recorded in any case, as a field of the trajectory: choose "
                "another name in `observe`."
            )
        checked[name] = _as_observable(name, what)
        if checked[name].follows_steps and not has_steps:
            raise ValueError(
                f"`observe[{name!r}]` is of the steps of a descent, one after the other: "
                "it needs `homoflow.descend` with `record_every=1`."
            )
    return checked


def _as_observable(name: str, what: Any) -> AbstractObservable:
    if isinstance(what, type):
        raise TypeError(
            f"`observe[{name!r}]` is the class {what.__name__}: pass an instance, "
            f"`{what.__name__}(…)`."
        )
    if isinstance(what, AbstractObservable):
        is_count = isinstance(what.every, int) and not isinstance(what.every, bool)
        if not is_count or what.every < 1:
            raise ValueError(
                f"`every` of `observe[{name!r}]` must be a positive integer; got "
                f"{what.every!r}."
            )
        return what
    if not callable(what):
        raise TypeError(
            f"`observe[{name!r}]` must be a function of a `homoflow.observe.Point`, or "
            f"an observable of `homoflow.observe`; got {type(what).__name__}."
        )
    return FunctionOfPoint(function=what)


def as_arrays(name: str, value: PyTree) -> PyTree[Array]:
    """An observable's value as arrays, which a compiled loop can record."""
    try:
        return jax.tree.map(jnp.asarray, value)
    except TypeError as error:
        raise TypeError(
            f"`observe[{name!r}]` must return an array or a pytree of arrays: {error}"
        ) from error
