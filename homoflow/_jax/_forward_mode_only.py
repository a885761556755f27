"""Values with derivatives of first order in forward mode, and no others."""

import equinox as eqx
import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

_NO_REVERSE_MODE = (
    "Reverse-mode derivatives (jax.grad, jax.vjp, jax.jacrev) through the exact flow, "
    "`homoflow.Filippov`, are not available. Forward-mode ones are: jax.jvp along one "
    "direction, jax.jacfwd along all."
)
_NO_SECOND_ORDER = (
    "Second derivatives through the exact flow, `homoflow.Filippov`, are not available: "
    "jax.jvp and jax.jacfwd give first ones."
)

_tangent_p = Primitive("homoflow_forward_only")


def _identity(tangent):
    return tangent


def _no_transpose(cotangent, tangent):
    del tangent
    if isinstance(cotangent, ad.Zero):
        return [None]
    raise NotImplementedError(_NO_REVERSE_MODE)


_tangent_p.def_impl(_identity)
_tangent_p.def_abstract_eval(_identity)
mlir.register_lowering(_tangent_p, mlir.lower_fun(_identity, multiple_results=False))
ad.deflinear2(_tangent_p, _no_transpose)
batching.defvectorized(_tangent_p)


def forbid_reverse_mode(tangents: PyTree) -> PyTree:
    """The tangents unchanged; `NotImplementedError` where one is transposed."""
    return jax.tree.map(
        lambda t: _tangent_p.bind(t) if eqx.is_inexact_array(t) else t, tangents
    )


@jax.custom_jvp
def _not_differentiable(leaf):
    return leaf


@_not_differentiable.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(_NO_SECOND_ORDER)


def forbid_second_derivatives(tree: PyTree) -> PyTree:
    """The tree unchanged; `NotImplementedError` where it is differentiated."""
    return jax.tree.map(
        lambda leaf: _not_differentiable(leaf) if eqx.is_inexact_array(leaf) else leaf,
        tree,
    )
