"""`compare`: two trajectories on one clock."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from .._jax._arguments import check_instance
from .._jax._arrays import tree_norm_of_any_size
from .._jax._compilation import fast_compile_jit
from .._jax._dtypes import cast_floats
from .._jax._tracing import is_concrete
from ._saved_models import models_at
from ._status import RESULTS
from ._trajectory import Trajectory

#: Times closer than this fraction of the whole span are the same time.
_SAME_TIME = 1e-5
_TRAJECTORY = (
    "a trajectory, which `homoflow.flow` and `homoflow.descend` return (not a model)"
)


class Comparison(eqx.Module):
    """Two trajectories at common times.

    - `ts`: the common times.
    - `losses_a`, `losses_b`: the objective of each there.
    - `laws_a`, `laws_b`: the laws that both recorded.
    - `weight_distance`: ‖w_a − w_b‖₂ of all arrays, at the end of both.
    - `relative_weight_distance`: the same over ‖w_a‖₂.
    - `function_distance`: root mean square of f_a(x) − f_b(x) over samples, summed over
        all outputs (of a pytree: all of its floating-point arrays), at the end; `None`
        without `x`.
    - `weight_distances`, `function_distances`: the same at `ts`, if both saved models and
        no interpolation was needed; otherwise `None`.
    - `notes`: what to know before believing the numbers; empty if there is nothing.
    """

    ts: Float[Array, " times"]
    losses_a: Float[Array, " times"]
    losses_b: Float[Array, " times"]
    laws_a: dict[str, Float[Array, "times ..."]]
    laws_b: dict[str, Float[Array, "times ..."]]
    weight_distance: Float[Array, ""]
    relative_weight_distance: Float[Array, ""]
    function_distance: Float[Array, ""] | None
    weight_distances: Float[Array, " times"] | None
    function_distances: Float[Array, " times"] | None
    notes: tuple[str, ...] = eqx.field(static=True)

    def __repr__(self) -> str:
        losses = f"{float(self.losses_a[-1]):.6g} and {float(self.losses_b[-1]):.6g}"
        lines = [
            f"{len(self.ts)} common times, t = {float(self.ts[0]):g} … "
            f"{float(self.ts[-1]):g}",
            f"loss at the last: {losses}; largest difference "
            f"{np.max(np.abs(np.asarray(self.losses_a) - np.asarray(self.losses_b))):.3g}",
            f"final weights differ by {float(self.weight_distance):.3g} "
            f"({float(self.relative_weight_distance):.3g} relative)",
        ]
        if self.function_distance is not None:
            lines.append(f"final outputs differ by {float(self.function_distance):.3g}")
        for name in self.laws_a:
            drift_a, drift_b = _drift(self.laws_a[name]), _drift(self.laws_b[name])
            lines.append(f"drift of {name}: {drift_a:.3g} and {drift_b:.3g}")
        lines += [f"note: {note}" for note in self.notes]
        return "Comparison\n  " + "\n  ".join(lines)


def compare(
    a: Trajectory, b: Trajectory, x: PyTree[ArrayLike] | None = None
) -> Comparison:
    """Two trajectories of the same model, of either half, at common times.

    Where they were recorded at the same times these are used; where they share fewer
    than two, the more finely recorded one is interpolated linearly to the times of the
    other, and a note says so.

    **Arguments:**

    - `a`, `b`: trajectories, such as `homoflow.flow` and `homoflow.descend` return.
    - `x`: inputs of shape `(samples, …)` at which to compare the functions.

    **Returns:** a `homoflow.Comparison`. Its `notes` say if a run did not finish, if the
    ends are at different times, or if an optimizer has no gradient-flow limit.

    **Raises:** `ValueError` if the models differ in structure, the times do not overlap,
    or the trajectories are batched or traced (index them first).

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    data = (x, x[:, :1])
    flow = hf.flow(model, data, t1=5.0)
    gd = hf.descend(model, data, steps=500, learning_rate=0.01)
    print(hf.compare(flow, gd, x))
    ```
    """
    _refuse_unless_comparable(a, b)
    notes = [*_notes("a", a), *_notes("b", b)]
    index_a, index_b = _common_times(np.asarray(a.ts), np.asarray(b.ts))
    exact = len(index_a) >= 2
    if exact:
        ts = jnp.asarray(np.asarray(a.ts)[index_a])
        read_a, read_b = _picker(index_a), _picker(index_b)
    else:
        ts = _coarser_times(a, b)
        read_a, read_b = _interpolator(a.ts, ts), _interpolator(b.ts, ts)
        notes.append(
            "The two were recorded at different times: losses and laws are interpolated "
            "linearly. Record both at the same times for exact differences."
        )
    ends = _end(a), _end(b)
    have_finished = not (RESULTS[a.result] or RESULTS[b.result])
    if have_finished and not abs(ends[0] - ends[1]) <= _SAME_TIME * max(ends):
        notes.append(
            f"The final models are those of different times, {ends[0]:g} and {ends[1]:g}: "
            "the distances between final weights and outputs are not of one time. Run "
            "both to the same `t1`."
        )
    x = None if x is None else _as_inputs(x, a.model)
    shared = [name for name in a.laws if name in b.laws]
    distances = _distances(a.model, b.model, x)
    along = exact and a.models is not None and b.models is not None
    models = (models_at(a, index_a), models_at(b, index_b)) if along else None
    apart = None if models is None else _distances_along(*models, x)
    return Comparison(
        ts=ts,
        losses_a=read_a(a.losses),
        losses_b=read_b(b.losses),
        laws_a={name: read_a(a.laws[name]) for name in shared},
        laws_b={name: read_b(b.laws[name]) for name in shared},
        weight_distance=distances.weights,
        relative_weight_distance=distances.weights / distances.norm,
        function_distance=distances.functions,
        weight_distances=None if apart is None else apart.weights,
        function_distances=None if apart is None else apart.functions,
        notes=tuple(notes),
    )


def _refuse_unless_comparable(a: Trajectory, b: Trajectory) -> None:
    for name, run in (("a", a), ("b", b)):
        check_instance(name, run, Trajectory, _TRAJECTORY)
    if not is_concrete((a, b)) or a.ts.ndim != 1 or b.ts.ndim != 1:
        raise ValueError(
            "`compare` takes two single trajectories with known values. Take one out of "
            "a batch first: "
            "`jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, sweep)`."
        )
    if jax.tree.structure(_arrays(a.model)) != jax.tree.structure(_arrays(b.model)):
        raise ValueError("The two trajectories are of models of different structure.")


def _notes(name: str, t: Trajectory) -> list[str]:
    notes = []
    message = RESULTS[t.result]
    if message:
        reached = float(t.stats["time_reached"])
        notes.append(f"{name} did not finish (it got to t = {reached:g}). {message}")
    time_unit = str(t.stats["time_unit"])
    if time_unit != "flow time":
        notes.append(f"The clock of {name}: {time_unit}")
    estimate = t.stats["error_estimate"]
    if estimate is not None:
        error = float(estimate)
        solver, kinks = t.stats["solver"], t.stats["nonsmooth_ops"]
        is_averaged = kinks != "none found" and solver != "Filippov"
        kind = f"an approximate flow ({solver} over kinks)" if is_averaged else "a flow"
        notes.append(
            f"{name} is {kind}: the relative error of its final weights is estimated at "
            f"{error:.1g}."
        )
    return notes


def _end(t: Trajectory) -> float:
    """The time of the final model, which may be later than the last one recorded."""
    return float(t.stats["time_reached"])


def _common_times(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices into both of the times that they share, up to rounding."""
    tolerance = _SAME_TIME * min(_spacing(a), _spacing(b))
    nearest = np.clip(np.searchsorted(b, a), 1, len(b) - 1) if len(b) > 1 else None
    if nearest is None:
        nearest = np.zeros(len(a), int)
    else:
        nearest -= np.abs(a - b[nearest - 1]) < np.abs(a - b[nearest])
    (shared,) = np.nonzero(np.abs(a - b[nearest]) <= tolerance)
    return shared, nearest[shared]


def _spacing(ts: np.ndarray) -> float:
    return float(ts[-1] - ts[0]) / max(len(ts) - 1, 1) if len(ts) > 1 else np.inf


def _coarser_times(a: Trajectory, b: Trajectory) -> Array:
    low = max(float(a.ts[0]), float(b.ts[0]))
    high = min(float(a.ts[-1]), float(b.ts[-1]))
    known = [np.asarray(t.ts) for t in (a, b)]
    inside = [jnp.asarray(ts[(ts >= low) & (ts <= high)]) for ts in known]
    coarser = min(inside, key=len)
    if len(coarser) == 0:
        raise ValueError("The two trajectories have no time in common.")
    return coarser


def _picker(index: np.ndarray):
    def pick(tree):
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[index]), tree)

    return pick


def _interpolator(ts: Array, at: Array):
    # By NumPy: JAX would compile a program for every number of times.
    known, wanted = np.asarray(ts), np.asarray(at)

    def read(tree):
        def interpolate(values):
            flat = np.asarray(values).reshape(len(known), -1)
            columns = [np.interp(wanted, known, column) for column in flat.T]
            read = np.asarray(columns, values.dtype).reshape(-1, len(wanted)).T
            return jnp.asarray(read.reshape(len(wanted), *values.shape[1:]))

        return jax.tree.map(interpolate, tree)

    return read


class _Distances(NamedTuple):
    """‖w_a − w_b‖, ‖w_a‖ and the distance of the functions, if inputs are known."""

    weights: Float[Array, ""]
    norm: Float[Array, ""]
    functions: Float[Array, ""] | None


def _measure(a: PyTree, b: PyTree, x: PyTree[Array] | None) -> _Distances:
    return _Distances(
        _weight_distance(a, b),
        tree_norm_of_any_size(_arrays(a)),
        None if x is None else _function_distance(a, b, x),
    )


@fast_compile_jit
def _distances(a: PyTree, b: PyTree, x: PyTree[Array] | None) -> _Distances:
    return _measure(a, b, x)


@fast_compile_jit
def _distances_along(a: PyTree, b: PyTree, x: PyTree[Array] | None) -> PyTree:
    """The same for models whose arrays have a leading axis."""
    return eqx.filter_vmap(_measure, in_axes=(eqx.if_array(0), eqx.if_array(0), None))(
        a, b, x
    )


def _arrays(model: PyTree) -> PyTree:
    return eqx.filter(model, eqx.is_inexact_array)


def _weight_distance(a: PyTree, b: PyTree) -> Float[Array, ""]:
    return tree_norm_of_any_size(jax.tree.map(jnp.subtract, _arrays(a), _arrays(b)))


def _function_distance(a: PyTree, b: PyTree, x: PyTree[Array]) -> Float[Array, ""]:
    differences = jax.tree.leaves(
        jax.tree.map(jnp.subtract, *(_outputs(m, x) for m in (a, b)))
    )
    squares = [jnp.sum(jnp.abs(d) ** 2) for d in differences]
    whole = sum((s.astype(squares[0].dtype) for s in squares[1:]), start=squares[0])
    return jnp.sqrt(whole / differences[0].shape[0])


def _outputs(model: PyTree, x: PyTree[Array]) -> PyTree[Array]:
    """All that the model returns that is no integer, for each sample."""
    outputs = eqx.filter(jax.vmap(model)(x), eqx.is_inexact_array)
    if not jax.tree.leaves(outputs):
        raise ValueError(
            "`compare` was given `x`, but the models return no floating-point numbers to "
            "compare there: leave `x` out."
        )
    return outputs


def _as_inputs(x: PyTree, model: PyTree) -> PyTree[Array]:
    """Inputs as the runs saw them: floats in the dtype of the weights."""
    dtype = jax.tree.leaves(_arrays(model))[0].dtype
    return cast_floats(jax.tree.map(jnp.asarray, x), dtype)


def _drift(values: Array) -> float:
    known = np.asarray(values)
    return float(np.max(np.abs(known - known[:1])))
