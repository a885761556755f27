"""`spectrum`: the largest or smallest eigenvalues of the Hessian of a loss."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._observe._sharpness import (
    TopEigenvalues,
    hessian_eigenvalues,
    random_vectors,
)
from .._problem._checks import check_count
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, Problem, make_problem
from .._problem._trainable import Trainable


def spectrum(
    model: PyTree,
    data: PyTree,
    k: int,
    *,
    end: str = "largest",
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
) -> TopEigenvalues:
    """The `k` largest or smallest eigenvalues of the Hessian ∇²L at `model`'s weights.

    By the iteration of `homoflow.sharpness`, with its accuracy: each value lies within its
    residual of an eigenvalue, and usually far closer. Along a run, record
    `homoflow.observe.Sharpness(k=…)`, which starts from the vectors of the time before.

    **Arguments:**

    - `k`: how many, at most as many as there are weights.
    - `end`: `"largest"` or `"smallest"`; the smallest are the most negative ones.
    - all others: as for `homoflow.flow`.

    **Returns:** `values` of shape `(k,)` in the dtype of the weights, the outermost first,
    NaN where the iteration did not converge; `residuals` ‖Hv − λv‖; and how many
    Hessian-vector products it took, `num_products`.

    **Raises:** `ValueError` for bad input.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    found = hf.spectrum(model, (x, x[:, :1]), 3)
    lowest = hf.spectrum(model, (x, x[:, :1]), 1, end="smallest")
    print(found.values, found.residuals, lowest.values)
    ```
    """
    check_count("k", k)
    if end not in ("largest", "smallest"):
        raise ValueError(f"`end` must be 'largest' or 'smallest'; got {end!r}.")
    problem = make_problem(
        model, data, loss=loss, objective=objective, trainable=trainable
    )
    sign = jnp.asarray(1 if end == "largest" else -1, problem.dtype)
    return _spectrum(problem, k, sign)


@fast_compile_jit
@full_matmul_precision()
def _spectrum(problem: Problem, k: int, sign: jax.Array) -> TopEigenvalues:
    start = random_vectors(problem.weights, k)
    found, _ = hessian_eigenvalues(problem, problem.weights, start, sign)
    return found._replace(values=sign * found.values)
