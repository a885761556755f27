"""Flat directions that laws explain: the tangents of the orbits of symmetries."""

import math

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from ..._jax._compilation import fast_compile_jit
from ..._jax._precision import full_matmul_precision
from ..._laws import Law
from ..._laws._bilinear_forms import finest_laws
from ._critical_point import CriticalPoint
from ._flat_loss import FlatLoss

#: Singular values below this, relative to the largest, are rounding.
_RANK = 1e-11
#: ‖∇²L·t‖ of a tangent t, relative to ‖∇²L‖·‖t‖: with more than this it is none.
_CURVED = 1e-8


def explained_directions(
    flat_loss: FlatLoss, point: CriticalPoint
) -> Float[np.ndarray, "explained size"]:
    """An orthonormal basis (rows) of the directions in which symmetries move weights.

    With the gradient 2Aw + b of a law w → w + ε(2Aw + b) is a symmetry of L, and so is
    the bracket of two of them: those of symmetric matrices are the rotations of linear
    units, which have no law of their own. (Weight decay leaves nothing but rotations.)
    At a stationary point L has no curvature along any of these directions. Where it has,
    the laws are not laws, and explain nothing.
    """
    is_decaying = flat_loss.weight_decay is not None
    laws = finest_laws(flat_loss.laws)
    if is_decaying:
        laws = tuple(law for law in laws if not _is_affine(law))
    nothing = np.zeros((0, point.weights.size))
    if not laws or not point.is_whole:
        return nothing
    fields, brackets = _tangents(flat_loss, laws, jnp.asarray(point.weights))
    tangents = np.asarray(brackets)
    if not is_decaying:
        tangents = np.concatenate([np.asarray(fields), tangents])
    longest = np.max(np.linalg.norm(tangents, axis=1))
    if longest == 0:
        return nothing
    tangents = tangents / longest
    images = (tangents @ point.vectors) * point.values
    if np.max(np.linalg.norm(images, axis=1)) > _CURVED * point.norm:
        return nothing
    _, values, directions = np.linalg.svd(tangents, full_matrices=False)
    return directions[values > _RANK * values[0]]


def _is_affine(law: Law) -> bool:
    return bool(law.linear_terms) or any(e.other_path is None for e in law.entries)


@fast_compile_jit
@full_matmul_precision()
def _tangents(
    flat_loss: FlatLoss, laws: tuple[Law, ...], flat: Float[Array, " size"]
) -> tuple[Float[Array, "draws size"], Float[Array, "draws size"]]:
    """∇h at w of random combinations h of laws, and brackets of two of them.

    As many as there are laws: random ones span what all of them span.
    """
    weights = flat_loss.problem.weights
    # A vector's components, unlike a gradient's, are divided by the units of weights.
    metric = 1 if flat_loss.scale is None else flat_loss.scale**-2
    shapes = [jax.eval_shape(law.value, weights).shape for law in laws]
    draws = min(sum(math.prod(shape) for shape in shapes), flat.size)

    def combination(key, w):
        """A random combination of all laws."""
        keys = jr.split(key, len(laws))
        shares = [
            jnp.sum(jr.normal(k, shape, flat.dtype) * law.value(flat_loss.weights(w)))
            for k, shape, law in zip(keys, shapes, laws, strict=True)
        ]
        return jnp.sum(jnp.stack(shares))

    def random_field_and_bracket(key):
        first, second = jr.split(key)

        def along(w):
            return metric * jax.grad(lambda v: combination(first, v))(w)

        def across(w):
            return metric * jax.grad(lambda v: combination(second, v))(w)

        there = jax.jvp(across, (flat,), (along(flat),))[1]
        back = jax.jvp(along, (flat,), (across(flat),))[1]
        return along(flat), there - back

    return jax.vmap(random_field_and_bracket)(jr.split(jr.key(0), draws))
