"""A training problem, checked at the door: what both halves of the library solve."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from .._jax._arguments import refuse_class
from .._jax._same_function import same_function
from .._jax._structural_cache import cached_by_structure
from .._jax._text import first_line, short_repr
from .._jax._tracing import is_concrete
from .._jaxpr import use_fast_softplus
from ._data import (
    as_objective_data,
    as_samples,
    check_model,
    refuse_nonfinite,
    sample_shape,
    shape_of,
)
from ._losses import AbstractLoss, LossLike, Risk, SquaredLoss, check_loss, with_arrays
from ._trainable import Trainable, trainable_mask

Objective = Callable[[PyTree, PyTree], Scalar]


class Problem(eqx.Module):
    """Minimize `objective(model, data)` over some of the model's arrays.

    - `weights`: the trained arrays, with `None` in place of everything else.
    - `frozen`: everything that is not trained, with `None` in place of `weights`.
    - `data`: `(x, y)` with samples along the first axis, or what an objective takes.
    - `mask`: a pytree like the model, true for the trained arrays.

    Made by `homoflow.make_problem`, which checks what it is given.
    """

    weights: PyTree
    frozen: PyTree
    data: PyTree
    objective: Objective
    mask: PyTree[bool]

    @property
    def model(self) -> PyTree:
        """The model at `weights`."""
        return self.model_at(self.weights)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the trained weights, and of everything that follows them."""
        return jax.tree.leaves(self.weights)[0].dtype

    @property
    def num_weights(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.weights))

    @property
    def num_samples(self) -> int | None:
        """How many samples the loss averages over; `None` for an `objective`."""
        if not isinstance(self.objective, Risk):
            return None
        return jax.tree.leaves(self.data)[0].shape[0]

    @property
    def has_homoflow_loss(self) -> bool:
        """Whether the loss is one of homoflow's own, all of which are smooth."""
        objective = self.objective
        return isinstance(objective, Risk) and isinstance(objective.loss, AbstractLoss)

    def model_at(self, weights: PyTree) -> PyTree:
        """The model with other trained arrays."""
        return eqx.combine(weights, self.frozen)

    def accepts_targets(self) -> Bool[Array, ""]:
        """Whether the loss can read the targets, where their values are known."""
        if not self.has_homoflow_loss:
            return jnp.asarray(True)
        x, y = self.data
        loss = self.objective.loss  # pyright: ignore[reportFunctionMemberAccess]

        def outputs() -> int:
            return _prediction_shape(self.model, x, y, loss).size

        return loss.accepts_targets(y, outputs)

    def loss(self, weights: PyTree) -> Float[Array, ""]:
        """L(w)."""
        return self.loss_of(weights, self.data)

    def loss_of(self, weights: PyTree, data: PyTree) -> Float[Array, ""]:
        """L(w) for other data."""
        # The promotion that Diffrax sets while it solves: in another one JAX would trace
        # the model again. A user's own has been tried when the problem was made.
        with jax.numpy_dtype_promotion("standard"):
            return _evaluate(self.objective, self.frozen, weights, data)


# JAX remembers what it has traced: however often L and its gradient stand in a program,
# the model is called once.
@eqx.filter_jit
def _evaluate(objective: Objective, frozen: PyTree, weights: PyTree, data: PyTree):
    @use_fast_softplus
    def loss(weights: PyTree) -> Float[Array, ""]:
        return objective(eqx.combine(weights, frozen), data)

    return loss(weights)


def make_problem(
    model: PyTree,
    data: PyTree,
    *,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
) -> Problem:
    """What `homoflow.flow` and `homoflow.descend` minimize, checked.

    Shapes and types are always checked, values (NaN, labels) where they are known.

    **Arguments:** as for `homoflow.flow`.

    **Returns:** a `homoflow.Problem`, with data in the dtype of the weights.

    **Raises:** `ValueError` or `TypeError` that says what is wrong with the input.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    problem = hf.make_problem(model, (x, x[:, :1]))
    gradient = jax.grad(problem.loss)(problem.weights)
    ```
    """
    _check_kinds(model, loss, objective)
    mask = trainable_mask(model, trainable)
    weights = eqx.filter(model, mask)
    dtype = _common_dtype(weights)
    refuse_nonfinite("model's weights", weights)
    if objective is None:
        data = as_samples(model, data, dtype)
        _check_targets(model, data, loss)
    else:
        data = as_objective_data(data, dtype)
        _refuse_unless_scalar("objective", _objective_shape(objective, model, data))
    if objective is None:
        minimized = Risk(with_arrays(same_function(loss), dtype))
    else:
        minimized = same_function(objective)
    return Problem(
        weights, eqx.filter(model, mask, inverse=True), data, minimized, mask
    )


def _check_kinds(model: PyTree, loss: Any, objective: Any) -> None:
    """`TypeError` or `ValueError` for what cannot be a model, a loss, an objective."""
    check_loss(loss)
    if objective is None:
        check_model(model)
        return
    refuse_class("objective", objective)
    if not callable(objective):
        raise TypeError(
            "`objective` must be a function `(model, data) -> scalar`; got "
            f"{short_repr(objective)}."
        )
    is_default = type(loss) is SquaredLoss and loss.reduction == "mean"
    if not is_default:
        raise ValueError(
            "`loss` and `objective` are both given: an objective is all that is "
            "minimized. Give one of them."
        )


def _check_targets(model: PyTree, data: tuple[PyTree[Array], Array], loss: LossLike):
    x, y = data
    prediction = _prediction_shape(model, x, y, loss)
    if isinstance(loss, AbstractLoss) and is_concrete(y):
        loss.check_targets(y, prediction.size)


@cached_by_structure()
def _prediction_shape(model: PyTree, x: PyTree, y: Array, loss: LossLike):
    """The shape of one prediction; `ValueError` unless the loss of it is a number."""
    prediction, target = shape_of(model, sample_shape(x)), sample_shape(y)
    try:
        value = shape_of(loss, prediction, target)
    except Exception as error:  # whatever a user's loss raises
        if isinstance(loss, AbstractLoss) and isinstance(error, ValueError):
            raise
        shapes = [getattr(part, "shape", part) for part in (prediction, target)]
        raise ValueError(
            f"The loss cannot be applied to one prediction and one target, of shapes "
            f"{shapes[0]} and {shapes[1]}: {type(error).__name__}, "
            f"{first_line(error).rstrip('.')}. homoflow applies it to each sample by "
            "itself and averages: it has no batch axis, and must return one number."
        ) from error
    _refuse_unless_scalar("loss", value)
    return prediction


def _objective_shape(objective: Objective, model: PyTree, data: PyTree) -> Any:
    """What an objective returns; errors of its arguments' number say how it is called."""
    try:
        inspect.signature(objective).bind(model, data)
    except TypeError as error:
        raise TypeError(
            f"`objective` is called with the model and its data: {error}."
        ) from error
    except ValueError:  # Some builtins have no signature.
        pass
    return shape_of(objective, model, data)


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
    over = " over the outputs of one sample" if what == "loss" else ""
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"The {what} must return one real number (a floating-point scalar); it "
            f"returns {value}. Sum or average it{over}."
        )
