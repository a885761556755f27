"""The dimension of the Lie algebra that gradients generate, at generic weights."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._jax._structural_cache import cached_by_structure
from .._jaxpr import inner_jaxprs, nonsmooth_primitives
from .search._null_space import normalize_rows
from .search._random_points import SIZES
from .search._vectorized import GradientField, VectorizedProblem

#: The deepest brackets, and the most operations that one may take: each level takes about
#: three times as many as the one before, and compilation as much longer.
_MAX_DEPTH, _MAX_OPERATIONS = 5, 6000
#: How many generic weights are tried where the rank is the same at almost all of them, and
#: where it depends on which units are active; and at how many of them brackets are taken.
_NUM_SMOOTH, _NUM_KINKED, _NUM_BRACKETED = 4, 400, 4
#: How many gradients for each parameter are taken at a point.
_NUM_PER_PARAMETER = 3
#: Singular values above the first, relative to the largest, are certainly none of rounding;
#: those between the two may be either.
_CLEAR, _ROUNDING = 1e-9, 1e-12
#: The same for brackets, in which terms cancel.
_CLEAR_BRACKETS, _ROUNDING_BRACKETS = 1e-7, 1e-10
#: Up to this size, relative to the terms that cancel in it, a bracket is rounding;
_CANCELLATION = 1e-5
#: and up to these sizes, relative to the usual ones, gradients and brackets are left out.
_MIN_GRADIENT, _MIN_SIZE = 1e-3, 1e-6
#: How often rows and columns are scaled, and from which size on columns are.
_NUM_SCALINGS, _MIN_COLUMN = 2, 1e-2
#: Which share of the weights is made positive at every other point.
_POSITIVE = 0.6


class LieDimension(NamedTuple):
    """What is known of dim Lie at generic weights.

    - `at_least`: the largest numerical rank, which only counts what is clearly not 0.
    - `depth`: of the deepest brackets that were needed.
    - `is_final`: whether there is proof that it is no larger: the function is smooth, the
        same number came out at all weights, deeper brackets add nothing, and no singular
        value is in between.
    """

    at_least: int
    depth: int
    is_final: bool


def lie_dimension(problem: VectorizedProblem, enough: int) -> LieDimension:
    """dim Lie at generic weights; stops when `enough` is reached.

    Where units can be inactive, the dimension depends on the weights, and the largest one
    counts: other weights could always have a larger one still, so that it is never final.
    """
    is_smooth = _is_smooth(problem)
    fields = _gradients(problem)
    best: list[tuple[int, int, np.ndarray, np.ndarray]] = []
    for i, w in _weights(problem, _NUM_SMOOTH if is_smooth else _NUM_KINKED):
        rows = fields(w, i)
        rank, is_clear = numerical_rank(rows, _CLEAR, _ROUNDING)
        best.append((rank, is_clear, w, rows))
        best.sort(key=lambda entry: -entry[0])
        del best[max(_NUM_SMOOTH, _NUM_BRACKETED) :]
        if rank >= enough:
            return LieDimension(rank, 1, True)
    ranks = [rank for rank, *_ in best]
    clear = [is_clear for _, is_clear, *_ in best]
    depth = 1
    for deeper in range(2, _MAX_DEPTH + 1):
        bracket = _brackets(problem, deeper)
        if bracket is None:
            return LieDimension(max(ranks), depth, False)
        before = list(ranks)
        for i, (_, _, w, rows) in enumerate(best):
            rows = np.concatenate([rows, bracket(w, i)])
            rank, clear[i] = numerical_rank(rows, _CLEAR_BRACKETS, _ROUNDING_BRACKETS)
            best[i] = (*best[i][:3], rows)
            ranks[i] = max(rank, ranks[i])
            if ranks[i] >= enough:
                return LieDimension(ranks[i], deeper, True)
        if ranks == before:
            is_final = is_smooth and all(clear) and len(set(ranks)) == 1
            return LieDimension(max(ranks), depth, is_final)
        depth = deeper
    return LieDimension(max(ranks), depth, False)


def numerical_rank(
    rows: np.ndarray, clear: float = _CLEAR, rounding: float = _ROUNDING
) -> tuple[int, bool]:
    """How many singular values are clearly not 0, and whether all others clearly are.

    Rows and columns are scaled to like sizes first, which changes no rank.
    """
    rows = normalize_rows(rows)
    if not rows.size:
        return 0, True
    for _ in range(_NUM_SCALINGS):
        sizes = np.linalg.norm(rows, axis=0)
        # Rounding must not be blown up.
        is_clear = sizes > _MIN_COLUMN * sizes.max()
        rows = normalize_rows(rows / np.where(is_clear, sizes, sizes.max()))
    values = np.linalg.svd(rows, compute_uv=False)
    is_clear = values > clear * values[0]
    return int(is_clear.sum()), bool((values[~is_clear] <= rounding * values[0]).all())


def _weights(
    problem: VectorizedProblem, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Generic weights; every other with mostly positive ones, so that units are active."""
    weights, _ = problem.draw(count, seed=12)
    flipped = np.random.default_rng(13).random(weights.shape) < _POSITIVE
    for i, (w, is_positive) in enumerate(zip(weights, flipped, strict=True)):
        yield i, np.where(is_positive, np.abs(w), w) if i % 2 else w


def _is_smooth(problem: VectorizedProblem) -> bool:
    """Whether the objective is smooth, so that ranks are the same at almost all weights."""
    w, data = problem.draw(1, seed=1)
    arrays, others = eqx.partition(data, lambda leaf: hasattr(leaf, "shape"))

    def objective(v, arrays):
        model = eqx.combine(problem.unravel(v), problem.frozen)
        return problem.probe.objective(model, eqx.combine(arrays, others))

    with jax.enable_x64(True):
        first = jax.tree.map(lambda a: a[0], arrays)
        return not nonsmooth_primitives(objective, jnp.asarray(w[0]), first)


def _gradients(problem: VectorizedProblem) -> Callable[[np.ndarray, int], np.ndarray]:
    """(weights, seed) ↦ the gradients at many data, one in each row."""
    count = _NUM_PER_PARAMETER * problem.size + 8

    def evaluate(w: np.ndarray, seed: int) -> np.ndarray:
        with jax.enable_x64(True):
            data = _data(problem, count, seed)
            rows = np.asarray(_gradients_at(problem.gradient, w, data))
        return _usable(rows)

    return evaluate


def _data(problem: VectorizedProblem, count: int, *seed: int) -> Any:
    """Data of the usual sizes, one sample in each row."""
    sizes = np.array([SIZES[i % len(SIZES)] for i in range(count)])
    return problem.probe.draw(np.random.default_rng((12, *seed)), sizes)[1]


def _usable(rows: np.ndarray) -> np.ndarray:
    """The rows that are finite and not so small that rounding is much of them."""
    rows = rows[np.isfinite(rows).all(axis=1)]
    # Largest entries: squares of gradients beyond 1e154 overflow.
    sizes = np.max(np.abs(rows), axis=1, initial=0.0)
    if not sizes.any():
        return rows[:0]
    return rows[sizes > _MIN_GRADIENT * np.median(sizes[sizes > 0])]


def _brackets(
    problem: VectorizedProblem, depth: int
) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """(weights, seed) ↦ many brackets [X_1, [X_2, … X_d]], one in each row.

    They have length one; those that are hardly more than rounding are left out. `None` if
    a bracket takes too many operations.
    """
    count = _NUM_PER_PARAMETER * problem.size + 8

    def draw(seed: int):
        return [_data(problem, count, seed, depth, k) for k in range(depth)]

    with jax.enable_x64(True):
        one = jax.tree.map(lambda a: a[0], draw(0))
        size = _num_operations(problem.gradient, np.zeros(problem.size), one)
    if size > _MAX_OPERATIONS:
        return None

    def evaluate(w: np.ndarray, seed: int) -> np.ndarray:
        with jax.enable_x64(True):
            drawn = _brackets_at(problem.gradient, w, draw(seed))
            rows, scales = map(np.asarray, drawn)
        finite = np.isfinite(rows).all(axis=1) & np.isfinite(scales)
        rows, scales = rows[finite], scales[finite]
        floor = _CANCELLATION * scales
        if len(scales):
            floor = np.maximum(floor, _MIN_SIZE * np.median(scales))
        norms = np.linalg.norm(rows, axis=1)
        return rows[norms > floor] / norms[norms > floor, None]

    return evaluate


def _count_operations(closed) -> int:
    return sum(
        1 + sum(_count_operations(body) for body in inner_jaxprs(eqn))
        for eqn in closed.jaxpr.eqns
    )


@cached_by_structure()
def _num_operations(field: GradientField, w: Any, levels: list[Any]) -> int:
    """How many operations a bracket takes."""
    arrays, others = eqx.partition(levels, eqx.is_array_like)
    return _count_operations(
        jax.make_jaxpr(lambda w, a: _bracket(field, w, eqx.combine(a, others)))(
            w, arrays
        )
    )


@eqx.filter_jit
def _gradients_at(field: GradientField, w: Any, data: Any) -> Any:
    """∇L at weights, for many data."""
    return jax.vmap(field, in_axes=(None, 0))(w, data)


@eqx.filter_jit
def _brackets_at(field: GradientField, w: Any, levels: list[Any]) -> Any:
    """Brackets at weights, for many data."""
    return jax.vmap(functools.partial(_bracket, field), in_axes=(None, 0))(w, levels)


def _bracket(field: GradientField, w: Any, levels: list[Any]) -> tuple[Any, Any]:
    """A nested bracket, and the size that it would have without cancellation."""

    def outer(v):
        return field(v, levels[0])

    if len(levels) == 1:
        value = outer(w)
        return value, jnp.linalg.norm(value)

    def inner(v):
        return _bracket(field, v, levels[1:])[0]

    x, (y, inner_scale) = outer(w), _bracket(field, w, levels[1:])
    first = jax.jvp(inner, (w,), (x,))[1]
    second = jax.jvp(outer, (w,), (y,))[1]
    scale = jnp.linalg.norm(first) + jnp.linalg.norm(second)
    scale = scale + inner_scale * jnp.linalg.norm(x) / jnp.linalg.norm(w)
    return first - second, scale
