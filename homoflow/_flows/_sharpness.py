"""`sharpness`: the largest eigenvalue of the Hessian of a loss."""

from jaxtyping import Array, Float, PyTree

from .._jax._compilation import fast_compile_jit
from .._jax._precision import full_matmul_precision
from .._observe._sharpness import hessian_eigenvalues, random_vectors
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, Problem, make_problem
from .._problem._trainable import Trainable


def sharpness(
    model: PyTree,
    data: PyTree,
    *,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
) -> Float[Array, ""]:
    """λ_max(∇²L), the largest eigenvalue of the Hessian at `model`'s weights.

    Gradient descent with learning rate η is unstable in a direction of curvature
    λ > 2/η; with momentum μ, of λ > 2(1 + μ)/η.

    By a Krylov iteration with Hessian-vector products, until ‖Hv − λv‖ ≤ 3e-4·‖H‖: an
    eigenvalue lies within 3e-4·‖H‖ of the value, and usually within about 1e-7·‖H‖,
    because the error is of second order in the residual. The iteration starts at random
    and cannot prove that there is no larger one. At kinks (ReLU) there is no Hessian;
    elsewhere the kinks are not in it.

    **Arguments:** as for `homoflow.flow`.

    **Returns:** a scalar in the dtype of the weights, in units of 1/time; NaN if the
    iteration did not converge. It can be differentiated where the eigenvalue is simple.

    **Raises:** `ValueError` for bad input.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    limit = 2 / hf.sharpness(model, (x, x[:, :1]))  # of the learning rate
    ```
    """
    problem = make_problem(
        model, data, loss=loss, objective=objective, trainable=trainable
    )
    return _sharpness(problem)


@fast_compile_jit
@full_matmul_precision()
def _sharpness(problem: Problem) -> Float[Array, ""]:
    start = random_vectors(problem.weights, 1)
    return hessian_eigenvalues(problem, problem.weights, start)[0].values[0]
