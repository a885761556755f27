"""Whether a flow runs off to infinity because its data are separated."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..._jax._compilation import fast_compile_jit
from ..._jax._precision import full_matmul_precision
from ..._problem._losses import ExponentialLoss, LogisticLoss, Risk, SoftmaxCrossEntropy
from ..._problem._problem import Problem

#: The largest residual, relative to the outputs, of a direction that scales them.
_SCALES = 1e-8


def separation_loss(problem: Problem) -> float | None:
    """The loss below which there is no stationary point, or `None` if there is no such.

    Where the loss is below log 2/m (logistic, cross-entropy) or 1/m (exponential) every
    one of m samples has a positive margin, now and, since the loss falls, ever after.
    If moving the weights in some direction scales the outputs, as scaling the last layer
    does, it lowers the loss of all samples: no such point is stationary, and so the
    weights of the flow go to infinity [Lyu & Li 2020; Ji & Telgarsky 2020].
    """
    objective = problem.objective
    if not isinstance(objective, Risk):
        return None
    loss = objective.loss
    x, y = problem.data
    if isinstance(loss, ExponentialLoss):
        most = 1.0
    elif isinstance(loss, LogisticLoss) or (
        isinstance(loss, SoftmaxCrossEntropy) and _are_classes(np.asarray(y))
    ):
        most = math.log(2)
    else:
        return None
    samples = jax.tree.leaves(x)[0].shape[0]
    if not _outputs_scale(problem):
        return None
    return most / samples if objective.is_mean else most


def _are_classes(targets: np.ndarray) -> bool:
    """Whether every target is one class, not a distribution over several."""
    if np.issubdtype(targets.dtype, np.integer):
        return True
    return bool(
        np.all((targets == 0) | (targets == 1)) and np.all(targets.sum(-1) == 1)
    )


def _outputs_scale(problem: Problem) -> bool:
    """Whether Σ c_k ⟨∂f/∂w_k, w_k⟩ = f for some numbers c_k, one for each array."""
    arrays = len(jax.tree.leaves(problem.weights))
    keys = jr.split(jr.key(0), arrays + 1)
    arrays_and_outputs = _growth(problem.weights, problem.frozen, problem.data[0], keys)
    growth, outputs = map(np.asarray, arrays_and_outputs)
    growth, outputs = growth.reshape(arrays, -1).T, outputs.ravel()
    shares = np.linalg.lstsq(growth, outputs)[0]
    residual = np.linalg.norm(growth @ shares - outputs)
    return bool(residual <= _SCALES * np.linalg.norm(outputs))


@fast_compile_jit
@full_matmul_precision()
def _growth(
    weights: PyTree, frozen: PyTree, x: PyTree[Array], keys: Array
) -> tuple[Float[Array, "arrays draws m ..."], Float[Array, "draws m ..."]]:
    """⟨∂f/∂w_k, w_k⟩ of all samples for every array w_k, and f, at random weights."""
    leaves, structure = jax.tree.flatten(weights)

    def growth_at_random_weights(key):
        drawn = [
            jr.normal(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(jr.split(key, len(leaves)), leaves, strict=True)
        ]

        def outputs(factors):
            scaled = [f * leaf for f, leaf in zip(factors, drawn, strict=True)]
            model = eqx.combine(jax.tree.unflatten(structure, scaled), frozen)
            return jax.vmap(model)(x)

        ones = jnp.ones(len(leaves), leaves[0].dtype)
        return jnp.moveaxis(jax.jacfwd(outputs)(ones), -1, 0), outputs(ones)

    return jax.vmap(growth_at_random_weights, out_axes=(1, 0))(keys)
