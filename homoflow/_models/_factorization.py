"""Asymmetric low-rank matrix factorization, and its two objectives."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._jax._arguments import check_key
from .._jax._random import normal
from ._initializers import Number, check_spread


class MatrixFactorization(eqx.Module):
    """The factors of UVᵀ, as a model [Du, Hu & Lee 2018, §3].

    As a function of one sample it is the two-layer linear network x ↦ U(Vᵀx).

    **Arguments:**

    - `d1`, `d2`, `r`: U has shape `(d1, r)`, V has shape `(d2, r)`.
    - `std`: entries of both start as N(0, std²) (0.1 by default).
    - `key`: a JAX random key.
    - `dtype`: of the factors (JAX's default floating-point type).

    ```python
    target = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(3))
    model = hf.MatrixFactorization(4, 3, r=1, key=jax.random.key(0))
    flow = hf.flow(model, target, t1=5.0, objective=hf.factorization_objective)
    ```
    """

    U: Float[Array, "d1 r"]
    V: Float[Array, "d2 r"]

    def __init__(
        self,
        d1: int,
        d2: int,
        r: int,
        *,
        std: Number = 0.1,
        key: PRNGKeyArray,
        dtype=None,
    ):
        check_key(key)
        check_spread("std", std)
        for name, size in (("d1", d1), ("d2", d2), ("r", r)):
            if not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"`{name}` must be a positive integer; got {size!r}.")
        key_u, key_v = jr.split(key)
        dtype = jnp.zeros(()).dtype if dtype is None else dtype
        std = jnp.asarray(std, dtype)
        self.U = std * normal(key_u, (d1, r), dtype)
        self.V = std * normal(key_v, (d2, r), dtype)

    def __call__(self, x: Float[Array, " d2"]) -> Float[Array, " d1"]:
        return self.U @ (self.V.T @ x)


def factorization_objective(
    model: MatrixFactorization, target: Float[Array, "d1 d2"]
) -> Float[Array, ""]:
    """½‖UVᵀ − M*‖_F², with no 1/m [Du, Hu & Lee 2018, eq. 1].

    Raises `ValueError` if `target` is not of shape `(d1, d2)`.
    """
    product = model.U @ model.V.T
    if target.shape != product.shape:
        raise ValueError(
            f"The target has shape {target.shape}, but UVᵀ has shape {product.shape}."
        )
    return 0.5 * jnp.sum((product - target) ** 2)


def regularized_factorization_objective(
    model: MatrixFactorization, target: Float[Array, "d1 d2"]
) -> Float[Array, ""]:
    """½‖UVᵀ − M*‖_F² + ⅛‖UᵀU − VᵀV‖_F² [Du, Hu & Lee 2018, eq. 3].

    The regularizer breaks the invariance: UᵀU − VᵀV is *not* conserved.
    """
    imbalance = model.U.T @ model.U - model.V.T @ model.V
    return factorization_objective(model, target) + 0.125 * jnp.sum(imbalance**2)
