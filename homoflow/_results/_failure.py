"""What runs that did not finish raise."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._jax._arguments import check_instance
from .._jax._enumerations import member_indices, member_names
from .._jax._tracing import is_concrete
from ._status import RESULTS
from ._trajectory import Trajectory

_is_failure_data = contextvars.ContextVar("homoflow_is_failure_data", default=False)

#: Of the runs that failed in the same way at most this many are listed.
_MAX_NAMED = 10


class TrajectoryError(RuntimeError):
    """A run that did not finish, or a batch of runs of which some did not.

    What was computed is in `trajectory`, of a batch all of its runs.
    """

    def __init__(self, message: str, trajectory: Trajectory):
        super().__init__(message)
        self.trajectory = trajectory


class TrajectoryInterrupt(KeyboardInterrupt):
    """A run that the user ended. What it had computed is in `trajectory`."""

    def __init__(self, trajectory: Trajectory):
        super().__init__("What was computed is in this error's `trajectory`.")
        self.trajectory = trajectory


class MustNotThrow(ValueError):
    """A run that would raise where one that does not finish is data."""


@contextlib.contextmanager
def failures_are_data() -> Iterator[None]:
    """Within it, what is compiled must not raise for a run that does not finish.

    An exception in a compiled batch would be the end of all of its runs.
    """
    token = _is_failure_data.set(True)
    try:
        yield
    finally:
        _is_failure_data.reset(token)


def raise_unless_successful(trajectory: Trajectory) -> Trajectory:
    """The trajectory, or an error if it did not finish; of a batch, the runs that failed.

    What `throw=True` does at the end of a run. For a batch that is compiled, run with
    `throw=False` and call this on what comes back: its error names the runs by their
    indices, and holds all of them. (With `throw=True` inside of `jax.jit` the error names
    them as well, but what was computed is lost.)

    **Arguments:** a `homoflow.Trajectory`, or a batch of them.

    **Returns:** the same. Inside of jit or vmap the error comes when the program runs.

    **Raises:** `homoflow.TrajectoryError`.

    ```python
    import equinox as eqx

    x = jax.random.normal(jax.random.key(1), (20, 3))

    @eqx.filter_jit
    @eqx.filter_vmap
    def sweep(key):
        model = hf.MLP((3, 8, 1), activation="linear", key=key)
        return hf.flow(model, (x, x[:, :1]), 1.0, throw=False)

    runs = hf.raise_unless_successful(sweep(jax.random.split(jax.random.key(0), 3)))
    ```
    """
    what = "a trajectory, which `homoflow.flow` and `homoflow.descend` return"
    check_instance("trajectory", trajectory, Trajectory, what)
    if is_concrete(trajectory):
        _raise_where_known(trajectory)
        return trajectory
    if _is_failure_data.get():
        raise MustNotThrow(
            "In a sweep a run that does not finish is data, with its `result`: pass "
            "`throw=False` to `homoflow.flow` and `homoflow.descend` inside of `run`."
        )
    _raise_in_vmap(trajectory)
    return _raise_when_run(trajectory)


def _raise_where_known(trajectory: Trajectory) -> None:
    indices = member_indices(trajectory.result)
    reached = np.asarray(trajectory.stats["time_reached"])
    if indices.ndim:
        message = _describe_batch(indices, reached)
    else:
        message = _describe(trajectory, _messages()[int(indices)])
    if message and indices.ndim:
        message += "\nWhat was computed of all runs is in this error's `trajectory`."
    if message:
        raise TrajectoryError(message, trajectory)


def _raise_in_vmap(trajectory: Trajectory) -> None:
    """The error with the whole batch, where vmap is not inside of anything compiled.

    There the rule below sees the numbers of all runs.
    """
    arrays, rest = eqx.partition(trajectory, eqx.is_array)

    @jax.custom_batching.custom_vmap
    def check(arrays):
        del arrays
        return jnp.zeros((), bool)

    @check.def_vmap
    def check_batch(axis_size, in_batched, arrays):
        def with_axis(array, has_axis):
            if has_axis:
                return array
            return jnp.broadcast_to(array, (axis_size, *array.shape))

        batch = jax.tree.map(with_axis, arrays, in_batched[0])
        if is_concrete(batch):
            _raise_where_known(eqx.combine(batch, rest))
            return jnp.zeros((), bool), False
        return check(batch), False

    check(jax.tree.map(_without_derivative, arrays))


def _raise_when_run(trajectory: Trajectory) -> Trajectory:
    """The trajectory; when what depends on it runs, an error unless all succeeded."""
    messages = _messages()

    def check(index, reached):
        indices, reached = np.asarray(index), np.asarray(reached)
        shape = np.broadcast_shapes(indices.shape, reached.shape)
        indices = np.broadcast_to(indices, shape)
        if np.any(indices != 0):
            message = _describe_batch(
                indices, np.broadcast_to(reached, shape), messages
            )
            raise RuntimeError(
                f"{message} Run with `throw=False`, and give what comes back to "
                "`homoflow.raise_unless_successful`: its error holds all that was "
                "computed."
            )
        return np.ones(shape, bool)

    is_good = jax.pure_callback(
        check,
        jax.ShapeDtypeStruct((), bool),
        jax.tree.leaves(trajectory.result)[0],
        _without_derivative(trajectory.stats["time_reached"]),
        vmap_method="broadcast_all",
    )
    # Whatever is used of the trajectory, the check is made.
    return jax.tree.map(
        lambda leaf: (
            jnp.where(is_good, leaf, jnp.nan).astype(leaf.dtype)
            if eqx.is_inexact_array(leaf)
            else leaf
        ),
        trajectory,
    )


def _without_derivative(array: Array) -> Array:
    if eqx.is_inexact_array(array):
        return jax.lax.stop_gradient(array)
    # A custom rule gives whole numbers tangents too, of no content, over which JAX's
    # `custom_vmap` stumbles. An operation on bits has none.
    return array | array


@functools.cache
def _messages() -> tuple[str, ...]:
    """What every result says, in the order of their indices; the first is no failure."""
    return tuple(RESULTS[getattr(RESULTS, name)] for name in member_names(RESULTS))


def _describe(trajectory: Trajectory, message: str) -> str:
    """What a single run's error says; nothing if it finished."""
    if not message:
        return ""
    where = f" It got to t = {float(trajectory.stats['time_reached']):.6g}"
    step = trajectory.stats["diverged_at_step"]
    if step is not None and int(step) >= 0:
        where += f", step {int(step)}"
    return (
        f"{message}{where}. What was computed is in this error's `trajectory`; with "
        "`throw=False` it is returned."
    )


def _describe_batch(
    indices: np.ndarray, reached: np.ndarray, messages: Sequence[str] | None = None
) -> str:
    """Which runs of a batch failed and how; nothing if all finished."""
    messages = _messages() if messages is None else messages
    names, failed = member_names(RESULTS), np.argwhere(indices != 0)
    if not len(failed):
        return ""
    if not indices.ndim:
        code = int(indices)
        return f"{names[code]}: {messages[code]} It got to t = {float(reached):.6g}."
    lines = [f"{len(failed)} of {indices.size} runs did not finish."]
    for code in np.unique(indices[indices != 0]):
        runs = [tuple(map(int, run)) for run in np.argwhere(indices == code)]
        shown = [
            f"{run[0] if len(run) == 1 else run} (to t = {reached[run]:.4g})"
            for run in runs[:_MAX_NAMED]
        ]
        noun = "run" if len(runs) == 1 else "runs"
        more = f" and {len(runs) - _MAX_NAMED} more" if len(runs) > _MAX_NAMED else ""
        lines.append(
            f"{names[code]}: {noun} {', '.join(shown)}{more}. {messages[code]}"
        )
    return "\n".join(lines)
