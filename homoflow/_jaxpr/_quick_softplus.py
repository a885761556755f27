"""log(1 + eˣ) in float64, at a quarter of what it costs on a CPU otherwise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array, Float

from ._interpreter import (
    CUSTOM_RULES,
    evaluated,
    inner_jaxprs,
    label_of,
    walk,
)

#: Of the series of atanh(s)/s in s², enough for s ≤ 1/3.
_TERMS = 16
#: Calls that are walked into.
_OPENED = frozenset({"jit", "pjit"})


def with_quick_softplus(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, with `jax.nn.softplus` by other formulas in float64.

    Right to 2 units of rounding, as are all its derivatives. XLA computes logarithms of
    float64 one by one on a CPU, where polynomials take four at a time.
    """

    def quick(*args):
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        if not _has_softplus(traced):
            return function(*args)
        results = walk(traced, jax.tree.leaves(args), _visit, lambda number: number)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return quick


@jax.custom_jvp
def softplus(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(x, 0) + log(1 + e) for e = e^{−|x|}, with log(1 + e) = 2·atanh(e/(2 + e))."""
    e = jnp.exp(-jnp.abs(x))
    s = e / (2 + e)
    series = 1 / (2 * _TERMS - 1)
    for k in reversed(range(_TERMS - 1)):
        series = series * (s * s) + 1 / (2 * k + 1)
    return jnp.maximum(x, 0) + 2 * s * series


@softplus.defjvp
def _softplus_derivative(primals, tangents):
    return softplus(*primals), _sigmoid(*primals) * tangents[0]


@jax.custom_jvp
def _sigmoid(x: Float[Array, "..."]) -> Float[Array, "..."]:
    e = jnp.exp(-jnp.abs(x))
    return jnp.where(x > 0, 1, e) / (1 + e)


@_sigmoid.defjvp
def _sigmoid_derivative(primals, tangents):
    (x,) = primals
    return _sigmoid(x), _sigmoid(x) * _sigmoid(-x) * tangents[0]


def _visit(eqn, operands: list[Any], site) -> list[Any]:
    del site
    if _is_softplus(eqn):
        return [softplus(operands[_place_of_x(eqn)])]
    body = next(inner_jaxprs(eqn), None)
    if eqn.primitive.name in _OPENED and body is not None and _has_softplus(body):
        return walk(body, operands, _visit, lambda number: number)
    return evaluated(eqn, operands)


def _has_softplus(closed: ClosedJaxpr) -> bool:
    return any(
        _is_softplus(eqn)
        or (
            eqn.primitive.name in _OPENED
            and any(_has_softplus(body) for body in inner_jaxprs(eqn))
        )
        for eqn in closed.jaxpr.eqns
    )


def _is_softplus(eqn) -> bool:
    """Whether an equation is JAX's log(eˣ + e⁰), or log(e⁰ + eˣ), in float64."""
    if eqn.primitive.name not in CUSTOM_RULES or label_of(eqn) != "logaddexp":
        return False
    body = next(inner_jaxprs(eqn), None)
    if body is None or "jax/_src/" not in _source(body):
        return False
    zeros = [isinstance(v, Literal) and bool(v.val == 0) for v in eqn.invars]
    (result,) = eqn.outvars
    return sum(zeros) == 1 and result.aval.dtype == jnp.float64


def _place_of_x(eqn) -> int:
    return next(i for i, v in enumerate(eqn.invars) if not isinstance(v, Literal))


def _source(body: ClosedJaxpr) -> str:
    return str(body.jaxpr.debug_info.func_src_info).replace("\\", "/")
