"""`flow_solution`: where the gradient flow goes from the iterates of a descent."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._jax._arguments import check_instance
from .._jax._arrays import tree_norm_of_any_size
from .._jax._enumerations import names_of
from .._problem._checks import check_count
from .._problem._losses import LossLike, SquaredLoss
from .._problem._problem import Objective
from .._problem._trainable import Trainable
from .._results._flow_solution import FlowSolution
from .._results._saved_models import models_at
from .._results._single_run import check_single_run
from .._results._stationary_kind import StationaryKind
from .._results._status import RESULTS
from .._results._trajectory import Trajectory
from ._flow import flow
from ._sharpness import sharpness


def flow_solution(
    run: Trajectory,
    data: PyTree,
    *,
    every: int = 1,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    objective: Objective | None = None,
    trainable: Trainable = None,
    max_steps: int = 100_000,
) -> FlowSolution:
    """Where the gradient flow would go from the iterates of a descent.

    The gradient flow solution (GFS) of an iterate is the end of the gradient flow that
    starts there. Its sharpness falls along gradient descent at large learning rates, at
    the edge of stability too, where the sharpness of the iterates goes up and down
    [Kreisler, Nacson, Soudry & Carmon 2023]: for scalar factorizations at every step,
    which is a theorem. In the time of the flow, conserved quantities name the end: what
    descent does to them is all that moves it.

    Every flow is followed to its stationary point (`homoflow.flow` with `t1=jnp.inf`).

    **Arguments:**

    - `run`: of `homoflow.descend` or a flow, with `save_models=True`; one run, outside of
        jit and vmap.
    - `every`: start a flow from every so manieth recorded model.
    - all others: as for `homoflow.flow`; those of the run.

    **Returns:** a `homoflow.FlowSolution`: losses, sharpness and models at the ends, at the
    times `ts` of the starts, in the run's dtype. A flow that comes to no stationary point
    has NaN, and its result by name in `results`.

    **Raises:** `ValueError` for a batch, for a run without saved models, and for one of
    which no loss is finite.

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    data = (x, x[:, :1])
    gd = hf.descend(model, data, 20, learning_rate=0.1, save_models=True)
    ends = hf.flow_solution(gd, data, every=10)
    ends.sharpness
    ```
    """
    check_instance("run", run, Trajectory, "a trajectory with `save_models=True`")
    check_count("every", every)
    check_single_run("flow_solution", run)
    if run.models is None:
        raise ValueError(
            "The run has not saved its models: run it again with `save_models=True`."
        )

    def end_of(start: PyTree) -> tuple[Trajectory, Array]:
        options: Any = {"loss": loss, "objective": objective, "trainable": trainable}
        end = flow(
            start, data, jnp.inf, laws=(), max_steps=max_steps, throw=False, **options
        )
        return end, sharpness(end.model, data, **options)

    known = np.flatnonzero(np.isfinite(run.losses))[::every]
    if not known.size:
        raise ValueError(
            "The run has no finite loss, and so no iterate that a flow could start from."
        )
    starts = models_at(run, known)
    ends, sharpnesses = zip(
        *(end_of(_entry(starts, i)) for i in range(len(known))), strict=True
    )
    results = tuple(_result_of(end) for end in ends)
    has_ended = np.asarray([result == "successful" for result in results])

    def over_starts(values: Iterable[Array]) -> Array:
        return jnp.where(has_ended, jnp.stack(list(values)), jnp.nan)

    models = jax.tree.map(_stack, *(end.model for end in ends))
    return FlowSolution(
        run.ts[known],
        over_starts(end.losses[-1] for end in ends),
        over_starts(sharpnesses),
        over_starts(jax.vmap(_distance)(_weights(models), _weights(starts))),
        models,
        results,
        tuple(_kind_of(end) for end in ends),
    )


def _entry(stacked: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda a: a[index] if eqx.is_array(a) else a, stacked)


def _stack(*leaves: Any) -> Any:
    return jnp.stack(leaves) if eqx.is_array(leaves[0]) else leaves[0]


def _weights(model: PyTree) -> PyTree:
    return eqx.filter(model, eqx.is_inexact_array)


def _distance(a: PyTree, b: PyTree) -> Float[Array, ""]:
    return tree_norm_of_any_size(jax.tree.map(jnp.subtract, a, b))


def _result_of(end: Trajectory) -> str:
    """How a flow ended; a limit of directions is at no point."""
    if end.limit is not None:
        return "no_stationary_point"
    return str(names_of(end.result, RESULTS))


def _kind_of(end: Trajectory) -> str:
    kind = end.stats["stationary_kind"]
    return "" if kind is None else str(names_of(kind, StationaryKind))
