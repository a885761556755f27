"""Translations that leave the loss as it is, and the linear laws behind them."""

from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._laws._law import Law

#: Up to so many values of linear laws their Gram matrix is inverted.
_MAX_VALUES = 512


class Translations(eqx.Module):
    """The translations w → w + Cᵀs behind linear laws Cw.

    That Cw is conserved whatever the data means that L does not change along the rows of
    C. So of the weights only `w − component(w)` counts, and rescalings may be applied to
    that alone: then the linear laws keep their values.
    """

    laws: tuple[Law, ...]
    inverse: Float[np.ndarray, "values values"]

    def component(self, model: PyTree) -> PyTree:
        """Cᵀ(CCᵀ)⁻¹Cw, the part of the weights that translations can move."""
        values, transpose = _values_and_transpose(self.laws, model)
        return transpose(jnp.asarray(self.inverse, values.dtype) @ values)


def make_translations(laws: Iterable[Law], weights: PyTree) -> Translations | None:
    """The translations behind the linear ones of some laws; `None` if there are none."""
    linear = tuple(law for law in laws if is_linear(law))
    if not linear:
        return None
    shapes = jax.tree.map(lambda w: np.zeros(w.shape, np.float32), weights)
    with jax.ensure_compile_time_eval():
        values, transpose = _values_and_transpose(linear, shapes)
        if values.size > _MAX_VALUES:
            raise ValueError(
                f"there are {values.size} values of linear laws, more than {_MAX_VALUES}"
            )
        gram = jax.vmap(lambda row: _values_and_transpose(linear, transpose(row))[0])(
            jnp.eye(values.size, dtype=values.dtype)
        )
    return Translations(linear, np.linalg.pinv(np.asarray(gram, float), rcond=1e-5))


def is_linear(law: Law) -> bool:
    """Whether a law is a linear function of the weights, and exact."""
    has_linear = law.linear_terms or law.entries
    is_quadratic = law.quadratic_terms or any(not e.is_linear for e in law.entries)
    return bool(has_linear) and not is_quadratic and law.violation is None


def _values_and_transpose(laws: tuple[Law, ...], model: PyTree):
    def evaluate(model: PyTree) -> Array:
        return jnp.concatenate([jnp.ravel(law.linear(model)) for law in laws])

    transpose = jax.linear_transpose(evaluate, model)
    return evaluate(model), lambda values: transpose(values)[0]
