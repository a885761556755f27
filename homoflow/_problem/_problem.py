"""A training problem, checked at the door: what both halves of the library solve."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from .._jax._tracing import is_concrete
from .._jaxpr import use_fast_softplus
from .._laws import Law, Laws, known_laws
from ._data import (
    as_objective_data,
    as_samples,
    refuse_nonfinite,
    sample_shape,
    shape_of,
)
from ._losses import AbstractLoss, LossLike, Risk
from ._trainable import Trainable, trainable_mask

Objective = Callable[[PyTree, PyTree], Scalar]


class Problem(eqx.Module):
    """Minimize `objective(model, data)` over the arrays that `mask` selects.

    - `weights`: the trained arrays, with `None` in place of everything else.
    - `frozen`: everything that is not trained, with `None` in place of `weights`.
    """

    weights: PyTree
    frozen: PyTree
    data: PyTree
    objective: Objective
    mask: PyTree[bool]
    laws: Laws

    @property
    def model(self) -> PyTree:
        """The model at `weights`."""
        return eqx.combine(self.weights, self.frozen)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the trained weights, and of everything that follows them."""
        return jax.tree.leaves(self.weights)[0].dtype

    def loss(self, weights: PyTree) -> Float[Array, ""]:
        """L(w)."""
        return self.loss_of(weights, self.data)

    def loss_of(self, weights: PyTree, data: PyTree) -> Float[Array, ""]:
        """L(w) for other data."""

        @use_fast_softplus
        def loss(weights: PyTree) -> Float[Array, ""]:
            return self.objective(eqx.combine(weights, self.frozen), data)

        return loss(weights)


def without_laws(problem: Problem) -> tuple[PyTree, ...]:
    """What L(w) is made of, and which of its arrays are weights."""
    return problem.model, problem.data, problem.objective, problem.mask


def pose(
    model: PyTree,
    data: Any,
    *,
    loss: LossLike,
    objective: Objective | None,
    trainable: Trainable,
    laws: Iterable[Law] | None,
) -> Problem:
    """The problem that a user's arguments describe, or an error that says what is wrong.

    Values (NaN, …) are checked where they are known; shapes and types always.
    """
    mask = trainable_mask(model, trainable)
    weights = eqx.filter(model, mask)
    dtype = _common_dtype(weights)
    refuse_nonfinite("model's weights", weights)
    if objective is None:
        x, y = data = as_samples(model, data, dtype)
        prediction = shape_of(model, sample_shape(x))
        value = shape_of(loss, prediction, sample_shape(y))
        _refuse_unless_scalar("loss", value)
        if isinstance(loss, AbstractLoss) and is_concrete(y):
            loss.check_targets(y, prediction.size)
        example, problem_objective = sample_shape(x), Risk(loss)
    else:
        example = data = as_objective_data(data, dtype)
        shape = shape_of(objective, model, data)
        _refuse_unless_scalar("objective", shape)
        problem_objective = objective
    if laws is None:
        found = known_laws(model, example, loss, objective=objective, trainable=mask)
    else:
        found = as_laws(laws)
    frozen = eqx.filter(model, mask, inverse=True)
    return Problem(weights, frozen, data, problem_objective, mask, found)


def _common_dtype(weights: PyTree) -> jnp.dtype:
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(weights)}
    if len(dtypes) > 1:
        raise ValueError(
            f"The trained arrays have different dtypes, {sorted(map(str, dtypes))}: "
            "make them one, so that every number in the result has a known precision."
        )
    return dtypes.pop()


def _refuse_unless_scalar(what: str, value: Any) -> None:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"The {what} must return one real number (a floating-point scalar); it "
            f"returns {value}. Sum or average it."
        )


def as_laws(laws: Iterable[Law]) -> Laws:
    """Laws that a user passes, or an error if they are not."""
    if isinstance(laws, Laws):
        return laws
    items = tuple(laws)
    for item in items:
        if not isinstance(item, Law):
            raise TypeError(
                f"`laws` must hold law objects as `homoflow.laws` returns them, not "
                f"{type(item).__name__}."
            )
    names = [law.name for law in items]
    if len(set(names)) < len(names):
        raise ValueError(f"Two of the laws have the same name: {names}.")
    return Laws(items)
