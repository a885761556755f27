"""Where the gradient of what is minimized jumps."""

import equinox as eqx
from jaxtyping import PyTree

from .._jax._structural_cache import cached_by_structure
from .._jaxpr import nonsmooth_primitives
from ._problem import Problem


@cached_by_structure()
def kinks_of(problem: Problem) -> tuple[str, ...]:
    """Names of the kinked operations between the weights and what is minimized.

    With one of homoflow's losses only the model is looked at: those losses have a
    continuous gradient, though formulas such as a stable log Σ exp do not show it.
    """
    arrays, rest = eqx.partition((problem.frozen, problem.data), eqx.is_array)

    def minimized(weights: PyTree, arrays: PyTree):
        frozen, data = eqx.combine(arrays, rest)
        model = eqx.combine(weights, frozen)
        if problem.has_homoflow_loss:
            return eqx.filter_vmap(model)(data[0])
        return problem.objective(model, data)

    return nonsmooth_primitives(minimized, problem.weights, arrays)
