"""The logarithm of a loss of exponential type: a number however small the loss is."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, PyTree, Shaped

from ._losses import (
    AbstractLoss,
    ExponentialLoss,
    LogisticLoss,
    Risk,
    SoftmaxCrossEntropy,
    as_target_of,
)
from ._problem import Problem

#: Below this log(1 + e)/e is its series, which has no 0/0 in it.
_SMALL = 1e-4


def log_risk(problem: Problem, weights: PyTree) -> Float[Array, ""]:
    """log L(w), where L itself may be far below the smallest number that is not 0."""
    return LogRisk(_risk(problem))(_predictions(problem, weights), problem.data[1])


def sample_margins(problem: Problem, weights: PyTree) -> Float[Array, "m outputs"]:
    """The margins whose exponentials the loss adds up, of each sample.

    One for each output with labels −1 and +1: y·f; one for each other class with class
    indices: f_y − f_c.
    """
    predictions = _predictions(problem, weights)
    return margins_of(_risk(problem), predictions, problem.data[1])


def margins_of(
    risk: Risk, predictions: Array, targets: Array
) -> Float[Array, "m outputs"]:
    """The same from the predictions."""
    return _of_samples(risk, predictions, targets, _MARGINS)


class LogRisk(eqx.Module):
    """log L from the predictions for all samples."""

    risk: Risk

    def __call__(self, predictions: Array, targets: Array) -> Float[Array, ""]:
        logs = _of_samples(self.risk, predictions, targets, _LOG_LOSSES)
        total = logsumexp(logs)
        if not self.risk.is_mean:
            return total
        return total - jnp.log(logs.size).astype(total.dtype)


def against_log_risk(problem: Problem) -> str | None:
    """Why the loss of a problem is not of exponential type; `None` if it is."""
    objective = problem.objective
    kinds = ", ".join(f"`homoflow.{kind.__name__}()`" for kind in _LOG_LOSSES)
    if not isinstance(objective, Risk):
        return f"a custom `objective` does not show its samples: use one of {kinds}"
    if type(objective.loss) not in _LOG_LOSSES:
        name = type(objective.loss).__name__
        return f"the loss must be of exponential type, {kinds}; this is {name}"
    _, y = problem.data
    is_classes = jnp.issubdtype(y.dtype, jnp.integer) and y.ndim == 1
    if type(objective.loss) is SoftmaxCrossEntropy and not is_classes:
        return "cross-entropy needs class indices (integers, shape (m,)) as targets"
    return None


def _predictions(problem: Problem, weights: PyTree) -> Array:
    return jax.vmap(problem.model_at(weights))(problem.data[0])


def _risk(problem: Problem) -> Risk:
    assert isinstance(problem.objective, Risk)
    return problem.objective


def _of_samples(
    risk: Risk,
    predictions: Array,
    targets: Array,
    by_loss: dict[type[AbstractLoss], Callable[[Array, Array], Array]],
) -> Array:
    """What belongs to the problem's loss, of each sample's prediction and target."""
    assert isinstance(risk.loss, AbstractLoss)
    return jax.vmap(by_loss[type(risk.loss)])(predictions, targets)


def _signed(
    prediction: Array, target: Shaped[Array, "..."]
) -> Float[Array, " outputs"]:
    return jnp.ravel(prediction * as_target_of(prediction, target))


def _ahead(prediction: Array, target: Shaped[Array, ""]) -> Float[Array, " others"]:
    """How far the right class is ahead of each other one."""
    others = jnp.arange(prediction.size - 1)
    is_after = others >= target.astype(others.dtype)
    return prediction[target] - prediction[others + is_after.astype(others.dtype)]


def _log_logistic(prediction: Array, target: Shaped[Array, "..."]) -> Float[Array, ""]:
    return logsumexp(_log_softplus(-_signed(prediction, target)))


def _log_exponential(prediction: Array, target: Shaped[Array, "..."]) -> Array:
    return logsumexp(-_signed(prediction, target))


def _log_cross_entropy(prediction: Array, target: Shaped[Array, ""]) -> Array:
    return _log_softplus(logsumexp(-_ahead(prediction, target)))


def _log_softplus(z: Float[Array, "..."]) -> Float[Array, "..."]:
    """log log(1 + eᶻ), with relative accuracy at either end.

    For z < 0 it is z + log(log(1 + e)/e) with e = eᶻ, whose second term tends to 0.
    """
    is_negative = z < 0
    e = jnp.exp(jnp.where(is_negative, z, 0))
    is_small = e < _SMALL
    safe = jnp.where(is_small, 1, e)
    series = e * (-1 / 2 + e * (5 / 24 - e / 8))
    below = z + jnp.where(is_small, series, jnp.log(jnp.log1p(safe) / safe))
    above = jnp.log(jax.nn.softplus(jnp.where(is_negative, 0, z)))
    return jnp.where(is_negative, below, above)


_LOG_LOSSES: dict[type[AbstractLoss], Callable[[Array, Array], Array]] = {
    LogisticLoss: _log_logistic,
    ExponentialLoss: _log_exponential,
    SoftmaxCrossEntropy: _log_cross_entropy,
}
_MARGINS: dict[type[AbstractLoss], Callable[[Array, Array], Array]] = {
    LogisticLoss: _signed,
    ExponentialLoss: _signed,
    SoftmaxCrossEntropy: _ahead,
}
