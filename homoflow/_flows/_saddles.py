"""`saddles`: the saddles that a flow has visited."""

import numpy as np
from jaxtyping import PyTree

from .._jax._tracing import is_concrete
from .._methods.stationary import find_saddles, why_no_saddles
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective, make_problem
from .._problem._smoothness import kinks_of
from .._problem._trainable import Trainable
from .._results._saddle import Saddle
from .._results._trajectory import Trajectory


def saddles(
    trajectory: Trajectory,
    data: PyTree,
    *,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    tolerance: float = 1e-2,
) -> tuple[Saddle, ...]:
    """The saddles that a flow has visited, in order: from small starts one after another.

    From a start of size s → 0 gradient flow passes saddle after saddle, each left after a
    time that grows like log(1/s), or like a power of 1/s at degenerate ones [Jacot et al.
    2021; Pesme & Flammarion 2023]. Plateaus are where ‖∇L‖ of the recorded times is least
    between two at which it is three times as large or more; from there Newton's method
    goes to the stationary point, which has to be near. A point that the run did not leave
    is a saddle only if the Hessian has a negative eigenvalue there.

    **Arguments:**

    - `trajectory`: of any flow, with `save_models=True` and records dense enough to have
        several on a plateau and between two. Between records nothing is seen.
    - `data`, `loss`, `objective`, `trainable`: as given to the flow.
    - `tolerance`: singular values and weights above this share of the run's largest make
        up `ranks` and `active`.

    **Returns:** a `homoflow.Saddle` for each.

    **Raises:** `ValueError` without `save_models`, for models with kinks, batches, more
    than 2,000 weights, and in jit or vmap.

    ```python
    model = hf.MLP((2, 2, 2), activation="linear", key=jax.random.key(0))
    model = jax.tree.map(lambda w: 1e-4 * w, model)
    x = jnp.array([[3.0, 0.0], [0.0, 1.0]])
    run = hf.flow(model, (x, x), 100.0, save_models=True)
    [saddle.ranks["layers[0].weight"] for saddle in hf.saddles(run, (x, x))]  # [0, 1]
    ```
    """
    start = trajectory.model
    problem = make_problem(
        start, data, loss=loss, objective=objective, trainable=trainable
    )
    if not is_concrete((trajectory, data)):
        raise ValueError(
            "Saddles are found in Python, from known values: outside of jit, vmap and grad."
        )
    reason = why_no_saddles(problem, trajectory)
    if reason is None and kinks_of(problem):
        reason = f"the gradient jumps at {', '.join(kinks_of(problem))}"
    if not (np.isfinite(tolerance) and 0 < tolerance < 1):
        raise ValueError(f"`tolerance` must lie between 0 and 1; got {tolerance}.")
    if reason is not None:
        raise ValueError(f"The saddles of this run cannot be found: {reason}.")
    return tuple(find_saddles(problem, trajectory, tolerance))
