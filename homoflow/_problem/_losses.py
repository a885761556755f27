"""Losses of one sample, and the empirical risk they add up to."""

import abc
from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree, Scalar, Shaped

from .._jax._arguments import check_number, refuse_class
from .._jax._text import short_repr

Reduction = Literal["mean", "sum"]
LossLike = Callable[[Any, Any], Scalar]
#: The losses there are.
_NAMES = (
    "SquaredLoss",
    "LogisticLoss",
    "ExponentialLoss",
    "SoftmaxCrossEntropy",
    "HuberLoss",
)


class AbstractLoss(eqx.Module):
    """ℓ(prediction, target) of one sample, and how samples are put together.

    `reduction` is `"mean"` (1/m Σ, eq. 4 of the paper, the default) or `"sum"`.
    """

    reduction: eqx.AbstractVar[Reduction]

    def __check_init__(self):
        if self.reduction not in get_args(Reduction):
            raise ValueError(
                f"`reduction` must be 'mean' or 'sum', not {self.reduction!r}."
            )

    @abc.abstractmethod
    def __call__(
        self, prediction: Float[Array, "*out"], target: Shaped[Array, "..."]
    ) -> Float[Array, ""]:
        """The loss of one sample, in the prediction's dtype."""

    @abc.abstractmethod
    def check_targets(self, targets: Shaped[Array, "m ..."], outputs: int) -> None:
        """Raise `ValueError` for targets (of all samples, with known values) that this
        loss would silently misread; `outputs` is the size of a prediction."""

    @abc.abstractmethod
    def accepts_targets(
        self, targets: Shaped[Array, "m ..."], outputs: Callable[[], int]
    ) -> Bool[Array, ""]:
        """The same for targets whose values are known only when a program runs."""


class SquaredLoss(AbstractLoss):
    """½‖prediction − target‖²."""

    reduction: Reduction = eqx.field(static=True, default="mean")

    def __call__(
        self, prediction: Float[Array, "*out"], target: Shaped[Array, "..."]
    ) -> Float[Array, ""]:
        return 0.5 * jnp.sum((prediction - as_target_of(prediction, target)) ** 2)

    def check_targets(self, targets: Shaped[Array, "m ..."], outputs: int) -> None:
        del targets, outputs  # Any numbers will do.

    def accepts_targets(
        self, targets: Shaped[Array, "m ..."], outputs: Callable[[], int]
    ) -> Bool[Array, ""]:
        del targets, outputs
        return jnp.asarray(True)


class LogisticLoss(AbstractLoss):
    """Σ log(1 + exp(−y·f)) over the outputs f, with labels y ∈ {−1, +1}."""

    reduction: Reduction = eqx.field(static=True, default="mean")

    def __call__(
        self, prediction: Float[Array, "*out"], target: Shaped[Array, "..."]
    ) -> Float[Array, ""]:
        return jnp.sum(jax.nn.softplus(-as_target_of(prediction, target) * prediction))

    def check_targets(self, targets: Shaped[Array, "m ..."], outputs: int) -> None:
        del outputs
        _refuse_unless_signs(targets)

    def accepts_targets(
        self, targets: Shaped[Array, "m ..."], outputs: Callable[[], int]
    ) -> Bool[Array, ""]:
        del outputs
        return jnp.all(jnp.abs(targets) == 1)


class ExponentialLoss(AbstractLoss):
    """Σ exp(−y·f) over the outputs f, with labels y ∈ {−1, +1}."""

    reduction: Reduction = eqx.field(static=True, default="mean")

    def __call__(
        self, prediction: Float[Array, "*out"], target: Shaped[Array, "..."]
    ) -> Float[Array, ""]:
        return jnp.sum(jnp.exp(-as_target_of(prediction, target) * prediction))

    def check_targets(self, targets: Shaped[Array, "m ..."], outputs: int) -> None:
        del outputs
        _refuse_unless_signs(targets)

    def accepts_targets(
        self, targets: Shaped[Array, "m ..."], outputs: Callable[[], int]
    ) -> Bool[Array, ""]:
        del outputs
        return jnp.all(jnp.abs(targets) == 1)


class SoftmaxCrossEntropy(AbstractLoss):
    """Cross-entropy of softmax(prediction) with a class index or class probabilities.

    The target is an integer (the class) or an array of the prediction's shape.
    """

    reduction: Reduction = eqx.field(static=True, default="mean")

    def __call__(
        self, prediction: Float[Array, " classes"], target: Shaped[Array, "..."]
    ) -> Float[Array, ""]:
        if jnp.ndim(target) == 0 and jnp.issubdtype(
            jnp.result_type(target), jnp.integer
        ):
            return optax.softmax_cross_entropy_with_integer_labels(prediction, target)
        return optax.softmax_cross_entropy(prediction, as_target_of(prediction, target))

    def check_targets(self, targets: Shaped[Array, "m ..."], outputs: int) -> None:
        if not bool(self.accepts_targets(targets, lambda: outputs)):
            raise ValueError(
                f"Class indices must lie in 0…{outputs - 1} for {outputs} outputs; got "
                f"{int(targets.min())}…{int(targets.max())}."
            )

    def accepts_targets(
        self, targets: Shaped[Array, "m ..."], outputs: Callable[[], int]
    ) -> Bool[Array, ""]:
        if not jnp.issubdtype(targets.dtype, jnp.integer) or targets.ndim != 1:
            return jnp.asarray(True)
        return jnp.all((targets >= 0) & (targets < outputs()))


class HuberLoss(AbstractLoss):
    """½r² where |r| ≤ `delta` and `delta`(|r| − ½`delta`) beyond, summed over outputs."""

    delta: float | Float[Array, ""] = 1.0
    reduction: Reduction = eqx.field(static=True, default="mean")

    def __check_init__(self):
        check_number("delta", self.delta)
        if not self.delta > 0:
            raise ValueError(f"`delta` must be positive; got {self.delta}.")

    def __call__(
        self, prediction: Float[Array, "*out"], target: Shaped[Array, "..."]
    ) -> Float[Array, ""]:
        residual = prediction - as_target_of(prediction, target)
        delta = jnp.asarray(self.delta, residual.dtype)
        return jnp.sum(optax.huber_loss(residual, delta=delta))

    def check_targets(self, targets: Shaped[Array, "m ..."], outputs: int) -> None:
        del targets, outputs  # Any numbers will do.

    def accepts_targets(
        self, targets: Shaped[Array, "m ..."], outputs: Callable[[], int]
    ) -> Bool[Array, ""]:
        del targets, outputs
        return jnp.asarray(True)


def with_arrays(loss: LossLike, dtype: Any) -> LossLike:
    """The loss with its numbers as arrays, so that others compile nothing new.

    Of homoflow's own losses only: a user's may ask what its numbers are.
    """
    if type(loss) is not HuberLoss:
        return loss
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, dtype)), loss)


class Risk(eqx.Module):
    """L(w) = (1/m) Σ_i ℓ(f_w(x_i), y_i), as an objective of model and data.

    The sum without 1/m where `loss.reduction` is `"sum"`; a plain callable is averaged.
    """

    loss: LossLike

    def __call__(
        self, model: PyTree, data: tuple[PyTree[Array], PyTree[Array]]
    ) -> Float[Array, ""]:
        x, y = data
        losses = jax.vmap(lambda xi, yi: self.loss(model(xi), yi))(x, y)
        return jnp.mean(losses) if self.is_mean else jnp.sum(losses)

    @property
    def is_mean(self) -> bool:
        return getattr(self.loss, "reduction", "mean") == "mean"


def as_target_of(prediction: Array, target: Shaped[Array, "..."]) -> Array:
    # Broadcasting (3,) against () would silently sum the wrong residuals.
    if jnp.shape(target) != prediction.shape:
        raise ValueError(
            f"The model predicts shape {prediction.shape} for one sample, but one "
            f"target has shape {jnp.shape(target)}.{_remedy(prediction, target)}"
        )
    return jnp.asarray(target, prediction.dtype)


def _remedy(prediction: Array, target: Shaped[Array, "..."]) -> str:
    """What to do about a target of another shape, where that can be guessed."""
    outputs, given = prediction.shape, jnp.shape(target)
    if outputs == (1,) and given == ():
        return (
            " For targets of shape (m,) and outputs of shape (1,) use `y[:, None]` (of a "
            "list or a pandas Series, `np.asarray(y)[:, None]`)."
        )
    if outputs == () and given == (1,):
        return " Use `y[:, 0]` as targets."
    if len(outputs) == 1 and given in ((), (1,)):
        index = "y" if given == () else "y[:, 0]"
        return (
            " If the targets are classes, use `loss=homoflow.SoftmaxCrossEntropy()` with "
            f"their indices as integers, `{index}.astype(int)`."
        )
    return ""


def _refuse_unless_signs(targets: Shaped[Array, "m ..."]) -> None:
    values = np.asarray(targets)
    if not np.all(np.abs(values) == 1):
        raise ValueError(
            "This loss takes labels −1 and +1; the targets hold others, such as "
            f"{values[np.abs(values) != 1].flat[0]}. For labels 0 and 1 use 2·y − 1."
        )


def check_loss(loss: Any) -> None:
    """`TypeError` unless it is a function, such as one of homoflow's losses."""
    refuse_class("loss", loss)
    if not callable(loss):
        names = ", ".join(f"`homoflow.{name}()`" for name in _NAMES)
        raise TypeError(
            f"`loss` must be one of {names}, or a function of one prediction and one "
            f"target that returns a number; got {short_repr(loss)}."
        )


def is_squared(objective: Any) -> bool:
    """Whether an objective is half a mean or sum of squares, as structure shows."""
    return isinstance(objective, Risk) and type(objective.loss) is SquaredLoss
