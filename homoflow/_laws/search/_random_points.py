"""Gradients at generic points in double precision: what laws are certified against."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._jax._compilation import fast_compile_jit
from ..._jax._precision import full_matmul_precision
from ..._jaxpr import outputs_without_inputs
from ..._problem._losses import Risk
from ._targets import DrawTargets, target_kinds

Point = tuple[PyTree, PyTree]
#: Sizes of the weights and of the data at successive points. Small and large ones, so
#: that kinks are met and saturating functions are seen on both sides.
SIZES = ((1.0, 1.0), (0.5, 3.0), (1.5, 0.3), (1.0, 8.0), (0.8, 1.0), (2.0, 2.0))
#: So large that thresholds in the code, if it has any, are likely passed.
LARGE_SIZES = ((0.7, 100.0), (1.0, 30.0), (1.0, 1e4))
#: Weights far from those of a usual network: clipping and bounds on norms act there.
FAR_SIZES = ((30.0, 1.0), (1e3, 0.1), (1e6, 1e-3), (0.02, 1.0), (300.0, 3.0))
#: Points at which each array has a size of its own, between these powers of ten: one layer
#: may be clipped while the next one is not.
_NUM_UNEVEN, _UNEVEN = 6, (-1.0, 2.0)
#: Weights with an entry beyond this are far from usual.
_FAR = 20.0
_MAX_TRIES = 3
#: How many points it takes to certify anything.
MIN_POINTS = 3
#: How much smaller than usual a gradient may be.
_MIN_RELATIVE_GRADIENT = 1e-3
#: Gradients beyond this overflow when they are multiplied by weights.
MAX_GRADIENT = 1e150
#: How many points of a small model are evaluated at once, and what counts as small.
_NUM_AT_ONCE, _MAX_STACKED = 32, 1000


@dataclasses.dataclass(frozen=True)
class Probe:
    """A training problem at random weights, data and targets.

    - `model`: in double precision; `mask` selects what is trained.
    - `example`: one sample; all of the data if there are no `samples` to draw.
    - `objective`: of the model and data.
    - `target`: random targets, given a generator and the leading axes; `None` if the
        objective needs none.
    - `given`: a data set to draw samples from, instead of random data and targets.
    """

    model: PyTree
    mask: PyTree
    example: PyTree
    objective: Callable[[PyTree, PyTree], Any]
    samples: int
    target: DrawTargets | None = None
    given: tuple[Any, Any] | None = None

    @property
    def size(self) -> int:
        """How many weights are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.trained))

    @property
    def trained(self) -> PyTree:
        """The weights that are trained."""
        return eqx.filter(self.model, self.mask)

    def draw_points(self, count: int, seed: int = 0) -> list[Point]:
        """(weights, gradient) at random points, as pytrees of NumPy arrays.

        There are `count` usual ones, a few with very large data, and a few with weights
        far from usual ones. Points at which the gradient is not finite or very small are
        left out: a probe at which no gradient flows proves nothing.
        """
        usual = [SIZES[i % len(SIZES)] for i in range(count)]
        uneven = [(1.0, 1.0)] * _NUM_UNEVEN
        sizes = np.array([*usual, *LARGE_SIZES, *FAR_SIZES, *uneven])
        points: list[Point | None] = [None] * len(sizes)
        left = np.arange(len(sizes))
        for attempt in range(_MAX_TRIES):
            rng = np.random.default_rng((seed, attempt))
            weights, data = self.draw(rng, sizes[left])
            is_uneven = left >= len(sizes) - _NUM_UNEVEN
            weights = jax.tree.map(functools.partial(_resize, rng, is_uneven), weights)
            if attempt:  # Logarithms and roots need positive weights.
                weights = jax.tree.map(abs, weights)
            gradients = self.gradients(weights, data)
            for row, k in enumerate(left):
                point = _take(weights, row), _take(gradients, row)
                points[k] = point if _is_finite(point[1]) else None
            left = np.array([k for k in left if points[k] is None], int)
            if not len(left):
                break
        return drop_degenerate_points([p for p in points if p is not None])

    def draw_vectors(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights and gradients at usual points, flat, one in each row.

        Where a gradient is not finite, weights are drawn again, all of them positive.
        """
        sizes = (*SIZES, *LARGE_SIZES)
        chosen = np.array([sizes[i % len(sizes)] for i in range(count)])
        rng = np.random.default_rng(seed)
        weights, data = self.draw(rng, chosen)
        gradients = self.gradients(weights, data)
        w, g = flatten_rows(weights), flatten_rows(gradients)
        failed = np.flatnonzero(~np.isfinite(g).all(axis=1))
        if len(failed) > count // 4:
            weights, data = self.draw(rng, chosen[failed])
            weights = jax.tree.map(abs, weights)
            w[failed] = flatten_rows(weights)
            g[failed] = flatten_rows(self.gradients(weights, data))
        return w, g

    def find_unused(self) -> list[bool]:
        """For each trained array, whether the traced gradient is 0 whatever comes in."""
        weights, data = self.draw(np.random.default_rng(0), np.ones((1, 2)))
        weights, data = _take((weights, data), 0)
        arrays, others = eqx.partition(data, _is_array)
        frozen = eqx.filter(self.model, self.mask, inverse=True)

        def gradient(w, arrays):
            data = eqx.combine(arrays, others)
            return jax.grad(lambda v: self.objective(eqx.combine(v, frozen), data))(w)

        with jax.enable_x64(True):
            return outputs_without_inputs(jax.make_jaxpr(gradient)(weights, arrays))

    def gradients(self, weights: PyTree, data: PyTree) -> PyTree:
        """∇L at weights and data that are stacked along a first axis."""
        count = len(jax.tree.leaves(weights)[0])
        width = _NUM_AT_ONCE if self.size <= _MAX_STACKED else 1
        parts = []
        for start in range(0, count, width):
            # The last part is filled up: another size would be compiled anew.
            rows = np.minimum(np.arange(start, start + width), count - 1)
            part = self._gradients_of_part(_take(weights, rows), _take(data, rows))
            parts.append(jax.tree.map(np.asarray, part))
        return jax.tree.map(lambda *a: np.concatenate(a)[:count], *parts)

    @functools.cached_property
    def _gradients_of_part(self) -> Callable[[PyTree, PyTree], PyTree]:
        frozen = eqx.filter(self.model, self.mask, inverse=True)

        @fast_compile_jit
        @full_matmul_precision()
        def evaluate(weights, data):
            arrays, others = eqx.partition(data, _is_array)

            def gradient(w, arrays):
                data = eqx.combine(arrays, others)
                return jax.grad(lambda v: self.objective(eqx.combine(v, frozen), data))(
                    w
                )

            if len(jax.tree.leaves(weights)[0]) == 1:
                # Convolutions take far longer under vmap.
                first = jax.tree.map(lambda a: a[0], (weights, arrays))
                return jax.tree.map(lambda g: g[None], gradient(*first))
            return jax.vmap(gradient)(weights, arrays)

        def evaluate_in_float64(weights, data):
            with jax.enable_x64(True):
                return evaluate(weights, data)

        return evaluate_in_float64

    def draw(self, rng: np.random.Generator, sizes: np.ndarray) -> tuple[Any, Any]:
        """Random weights and data, stacked: for each row of `sizes` (weights, data) one."""
        count = len(sizes)
        weights = jax.tree.map(
            lambda leaf: _draw_weights(rng, leaf, sizes[:, 0]), self.trained
        )
        if self.given is not None:
            total = len(jax.tree.leaves(self.given)[0])
            chosen = rng.integers(0, total, (count, max(self.samples, 1)))
            return weights, jax.tree.map(lambda a: np.asarray(a)[chosen], self.given)
        leading = (count, self.samples) if self.samples else (count,)
        x = jax.tree.map(
            lambda leaf: _draw_data(rng, leaf, sizes[:, 1], leading), self.example
        )
        if self.target is None:
            return weights, x
        return weights, (x, self.target(rng, leading))


def _resize(
    rng: np.random.Generator, is_uneven: np.ndarray, leaf: np.ndarray
) -> np.ndarray:
    """An array of stacked weights, with a random size in the rows that are marked."""
    factors = np.where(is_uneven, 10 ** rng.uniform(*_UNEVEN, len(leaf)), 1.0)
    return leaf * factors.reshape(-1, *(1,) * (leaf.ndim - 1))


def is_usual(point: Point) -> bool:
    """Whether the weights are not far from those of a usual network."""
    return 0.1 < _largest_entry(point[0]) < _FAR


def drop_degenerate_points(points: list[Point]) -> list[Point]:
    """Those whose gradient is finite, and not so small that rounding is much of it."""
    points = [p for p in points if _is_finite(p)]
    norms = [_largest_entry(gradient) for _, gradient in points]
    usual = np.median([n for n in norms if n < MAX_GRADIENT] or [0.0])
    return [
        point
        for point, norm in zip(points, norms, strict=True)
        if _MIN_RELATIVE_GRADIENT * usual <= norm < MAX_GRADIENT
    ]


def _largest_entry(tree: PyTree) -> float:
    sizes = (np.abs(a).max(initial=0.0) for a in jax.tree.leaves(tree))
    return float(max(sizes, default=0))


def probe_loss(
    model, mask, x_example, loss, *, batched: bool, samples: int
) -> list[Probe]:
    """For the mean of a loss over samples; one for each kind of targets."""
    model, x_example = to_float64((model, x_example))
    with jax.enable_x64(True):
        prediction = eqx.filter_eval_shape(model, x_example)
        rows: tuple[int, ...] = ()
        if batched:
            rows = (jax.tree.leaves(prediction)[0].shape[0],)
            prediction = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype),
                prediction,
            )
        kinds = target_kinds(loss, prediction)
    risk = _BatchRisk(loss) if batched else Risk(loss)
    count = 0 if batched else samples
    return [
        Probe(model, mask, x_example, risk, count, _with_rows(draw, rows))
        for draw in kinds
    ]


def _with_rows(draw: DrawTargets, rows: tuple[int, ...]) -> DrawTargets:
    """Targets of the rows of a batch, behind the other leading axes."""
    return lambda rng, leading: draw(rng, (*leading, *rows))


def probe_objective(model, mask, data, objective) -> Probe:
    """For an objective of model and data."""
    model, data = to_float64((model, data))
    return Probe(model, mask, data, objective, 0)


class _BatchRisk(eqx.Module):
    """The mean loss of a model that takes all samples at once."""

    loss: Callable

    def __call__(self, model, data):
        x, y = data
        return jnp.mean(jax.vmap(self.loss)(model(x), y))


def to_float64(tree: PyTree) -> PyTree:
    """The pytree with every floating-point array in float64."""

    def cast(leaf):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            return leaf
        is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return np.zeros(leaf.shape, np.float64 if is_real else leaf.dtype)
        with jax.enable_x64(True):
            return jnp.asarray(leaf, jnp.float64) if is_real else leaf

    return jax.tree.map(
        cast, tree, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct)
    )


def _draw_weights(rng: np.random.Generator, leaf, sizes: np.ndarray) -> np.ndarray:
    fan_in = leaf.size / leaf.shape[0] if leaf.ndim > 1 and leaf.shape[0] else 1.0
    drawn = rng.standard_normal((len(sizes), *leaf.shape)) / np.sqrt(max(fan_in, 1.0))
    return _along_first_axis(sizes, drawn) * drawn


def _draw_data(rng: np.random.Generator, leaf, spreads: np.ndarray, leading) -> Any:
    if not _is_array(leaf):
        return leaf
    shape = (*leading, *leaf.shape)
    if _is_key(leaf):
        seed = jax.random.key(int(rng.integers(2**31)), impl=jax.random.key_impl(leaf))
        return jax.random.split(seed, shape)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        drawn = rng.standard_normal(shape)
        return _along_first_axis(spreads, drawn) * drawn
    if leaf.dtype == bool:
        return rng.integers(0, 2, shape).astype(bool)
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        return np.broadcast_to(np.asarray(leaf), shape)
    values = np.asarray(leaf)
    low, high = min(int(values.min(initial=0)), 0), int(values.max(initial=0))
    return rng.integers(low, high + 1, shape).astype(leaf.dtype)


def _along_first_axis(factors: np.ndarray, array: np.ndarray) -> np.ndarray:
    return factors.reshape(-1, *[1] * (array.ndim - 1))


def flatten_rows(tree: PyTree) -> np.ndarray:
    """Arrays that are stacked along a first axis, as one flat vector in each row."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _take(tree: PyTree, rows) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[rows] if _is_array(leaf) else leaf, tree)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_array(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, np.ndarray)


def _is_finite(tree: PyTree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
