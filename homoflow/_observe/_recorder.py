"""What a run records at its times: what every run does, and what a user asks for."""

from collections.abc import Callable
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from .._jax._arrays import tree_norm_of_any_size
from .._laws import Laws, relative_violation
from ._base import AbstractObservable, Carry, FunctionOfPoint, Point, as_arrays
from ._large_laws import LargeLaw

Values = dict[str, PyTree]
Carries = dict[str, Carry]


def standard_observables(laws: Laws) -> dict[str, AbstractObservable]:
    """What every run records, by the names under which a `Trajectory` is put together."""
    return {
        "losses": FunctionOfPoint(function=_loss),
        "grad_norms": FunctionOfPoint(function=_gradient_norm),
        "squared_norms": FunctionOfPoint(function=_squared_norms),
        "laws": FunctionOfPoint(function=LawValues(laws.whole)),
        "law_violation": FunctionOfPoint(function=LawViolation(laws)),
    }


def summaries(laws: Laws, every: int) -> dict[str, AbstractObservable]:
    """What is recorded of large laws."""
    large = (law for law in laws if law.name in laws.large)
    return {law.name: LargeLaw(law=law, every=every) for law in large}


#: Names that a user's observables cannot have.
STANDARD = frozenset({"losses", "grad_norms", "squared_norms", "laws", "law_violation"})


#: At how many times, about, large laws are looked at: each takes as long as a gradient.
_MAX_SUMMARIES = 10


def _every(times: int) -> int:
    return max(1, (times - 1) // _MAX_SUMMARIES)


def _loss(point: Point) -> Float[Array, ""]:
    return point.loss


def _gradient_norm(point: Point) -> Float[Array, ""]:
    return tree_norm_of_any_size(point.gradient)


def _squared_norms(point: Point) -> dict[str, Float[Array, ""]]:
    """‖w‖² of each trained array, by its path in the model."""
    return {
        jax.tree_util.keystr(path).lstrip("."): jnp.sum(leaf**2)
        for path, leaf in jax.tree_util.tree_leaves_with_path(point.weights)
    }


@final
class LawValues(eqx.Module):
    """The value of every law, by its name."""

    laws: Laws

    def __call__(self, point: Point) -> dict[str, Float[Array, "..."]]:
        return self.laws.values(point.weights)


@final
class LawViolation(eqx.Module):
    """The largest |⟨2Aw + b, ∇L⟩| / (2‖w‖‖∇L‖ + ‖∇L‖) over all laws.

    Of large matrix laws an estimate of the Frobenius norm of all their entries. It is a
    certificate, made anew at every recorded point, that they are laws of what is
    minimized. It is a figure about the run: derivatives do not follow it.
    """

    laws: Laws

    def __call__(self, point: Point) -> Float[Array, ""]:
        if not len(self.laws):
            return jnp.zeros_like(point.loss)
        laws = self.laws
        violations = relative_violation(
            laws.items, point.weights, point.gradient, laws.large
        )
        return lax.stop_gradient(jnp.max(violations))


@final
class Recorder(eqx.Module):
    """All observables of a run, by name.

    - `laws`: the laws that are among them.
    - `num_asked`: how many were asked for beyond what every run records.
    """

    laws: Laws
    observables: dict[str, AbstractObservable]

    @staticmethod
    def create(
        laws: Laws,
        of_dynamics: dict[str, AbstractObservable],
        asked: dict[str, AbstractObservable],
        times: int = 1,
    ) -> "Recorder":
        """The standard observables, those of the dynamics, and those asked for.

        Dynamics may record more in place of a standard observable of the same name. Of
        large laws summaries are recorded, at a tenth or so of the `times`.
        """
        standard = standard_observables(laws) | summaries(laws, _every(times))
        return Recorder(laws, {**standard, **of_dynamics, **asked})

    @property
    def every(self) -> dict[str, int]:
        """How often each observable is recorded."""
        return {name: what.every for name, what in self.observables.items()}

    @property
    def sees_problem(self) -> bool:
        """Whether something is recorded that may look at the data."""
        own = STANDARD | self.laws.large
        return not self.observables.keys() <= own

    def start(self, make_point: Callable[[], Point]) -> Carries:
        """What the observables start from, at the point where the run starts.

        That is not made where only plain functions of a point are recorded.
        """
        observables = self.observables.values()
        if all(isinstance(what, FunctionOfPoint) for what in observables):
            return dict.fromkeys(self.observables)
        point = make_point()
        return {name: what.init(point) for name, what in self.observables.items()}

    def refuse_sequential(self, limit: int) -> None:
        """`ValueError` if an observable needs to see all times, one after the other."""
        for name, what in self.observables.items():
            if what.is_sequential:
                raise ValueError(
                    f"`observe[{name!r}]` hands something on from time to time, for which "
                    f"the weights at all times are kept, and here these are more than "
                    f"{limit:,} numbers: record at fewer `ts`."
                )

    def record_apart(
        self, point: Point, carries: Carries, names: frozenset[str]
    ) -> Values:
        """Some observables at a point, with what was handed on at the run's start."""
        return {
            name: as_arrays(name, what(point, carries[name])[0])
            for name, what in self.observables.items()
            if name in names
        }

    def record_next(
        self, point: Point, index: Any, carries: Carries
    ) -> tuple[Values, Carries]:
        """All observables at the recorded time of this index.

        Those that are not due at this time are NaN or zero, and drop out at the end:
        `thin_out`.
        """
        values, next_carries = {}, {}
        for name, what in self.observables.items():

            def evaluate(what=what, name=name):
                value, carry = what(point, carries[name])
                return as_arrays(name, value), carry

            if what.every == 1:
                values[name], next_carries[name] = evaluate()
                continue
            shapes = jax.eval_shape(evaluate)[0]

            def skip(shapes=shapes, what=what, name=name):
                nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
                return nothing, what.pass_by(point, carries[name])

            values[name], next_carries[name] = lax.cond(
                index % what.every == 0, evaluate, skip
            )
        return values, next_carries

    def thin_out(self, values: Values) -> Values:
        """Values over all recorded times, each observable's at its own times only."""
        return {
            name: jax.tree.map(lambda leaf, n=self.every[name]: leaf[::n], value)
            for name, value in values.items()
        }
