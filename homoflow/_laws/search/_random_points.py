"""Gradients at generic points in double precision: what laws are certified against."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._jax._precision import full_matmul_precision
from ..._problem._losses import ExponentialLoss, LogisticLoss, Risk, SoftmaxCrossEntropy

Point = tuple[PyTree, PyTree]
#: Sizes of the weights and of the data at successive points. Small and large ones, so
#: that kinks are met and saturating functions are seen on both sides.
SIZES = ((1.0, 1.0), (0.5, 3.0), (1.5, 0.3), (1.0, 8.0), (0.8, 1.0), (2.0, 2.0))
#: So large that thresholds in the code, if it has any, are likely passed.
LARGE_SIZES = ((0.7, 100.0), (1.0, 30.0), (1.0, 1e4))
_MAX_TRIES = 3
#: How many points it takes to certify anything.
MIN_POINTS = 3
#: How much smaller than usual a gradient may be.
_MIN_RELATIVE_GRADIENT = 1e-3
#: Gradients beyond this overflow when they are multiplied by weights.
MAX_GRADIENT = 1e150


@dataclasses.dataclass(frozen=True)
class Probe:
    """A training problem at random weights, data and targets.

    - `model`: in double precision; `mask` selects what is trained.
    - `example`: one sample; all of the data if there are no `samples` to draw.
    - `objective`: of the model and data.
    - `target`: random targets, given a generator and the number of samples; `None` if
        the objective needs none.
    - `given`: a data set to draw samples from, instead of random data and targets.
    """

    model: PyTree
    mask: PyTree
    example: PyTree
    objective: Callable[[PyTree, PyTree], Any]
    samples: int
    target: Callable[[np.random.Generator, int], np.ndarray] | None = None
    given: tuple[Any, Any] | None = None

    def draw_points(self, count: int, seed: int = 0) -> list[Point]:
        """(weights, gradient) at random points, as pytrees of NumPy arrays.

        There are `count` usual ones, and a few with very large data. Points at which
        the gradient is not finite or very small are left out.
        """
        sizes = [SIZES[i % len(SIZES)] for i in range(count)]
        return drop_degenerate_points(
            list(self._draw_points([*sizes, *LARGE_SIZES], seed))
        )

    def _draw_points(self, sizes, seed: int) -> Iterator[Point]:
        differentiate = self.compile_gradient()
        for i, size in enumerate(sizes):
            for attempt in range(_MAX_TRIES):
                rng = np.random.default_rng((seed, i, attempt))
                weights, data = self.draw(rng, *size)
                if attempt:  # Logarithms and roots need positive weights.
                    weights = jax.tree.map(abs, weights)
                gradient = jax.tree.map(np.asarray, differentiate(weights, data))
                if _is_finite(gradient):
                    yield weights, gradient
                    break

    def compile_gradient(self) -> Callable[[PyTree, PyTree], PyTree]:
        """∇L as a function of weights and data."""
        frozen = eqx.filter(self.model, self.mask, inverse=True)

        @eqx.filter_jit
        @full_matmul_precision()
        def gradient(weights, data):
            return jax.grad(lambda w: self.objective(eqx.combine(w, frozen), data))(
                weights
            )

        def differentiate(weights, data):
            with jax.enable_x64(True):
                return gradient(weights, data)

        return differentiate

    def draw(self, rng: np.random.Generator, size=1.0, spread=1.0) -> tuple[Any, Any]:
        """Random weights and random data, of sizes `size` and `spread`."""
        weights = jax.tree.map(
            lambda leaf: _draw_weights(rng, leaf, size),
            eqx.filter(self.model, self.mask),
        )
        if self.given is not None:
            count = len(jax.tree.leaves(self.given)[0])
            chosen = rng.integers(0, count, max(self.samples, 1))
            return weights, jax.tree.map(lambda a: np.asarray(a)[chosen], self.given)
        shape = (self.samples,) if self.samples else ()
        x = jax.tree.map(
            lambda leaf: _draw_data(rng, leaf, spread, shape), self.example
        )
        if self.target is None:
            return weights, x
        return weights, (x, self.target(rng, self.samples))


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


def probe_loss(model, mask, x_example, loss, *, batched: bool, samples: int) -> Probe:
    """For the mean of a loss over samples."""
    model, x_example = to_float64((model, x_example))
    with jax.enable_x64(True):
        shape = eqx.filter_eval_shape(model, x_example)
        risk = _BatchRisk(loss) if batched else Risk(loss)
        prediction = shape.shape[1:] if batched else shape.shape
        rows = shape.shape[0] if batched else None
        target = _target_sampler(loss, prediction, rows)
    return Probe(model, mask, x_example, risk, 0 if batched else samples, target)


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


def _target_sampler(loss, prediction: tuple[int, ...], batch: int | None):
    """Random targets of the kind that a loss takes, for a batch if its size is given."""
    classes = prediction[-1] if prediction else 1

    def draw_real(rng, count):
        rows = count if batch is None else batch
        return rng.standard_normal((rows, *prediction))

    def draw_signs(rng, count):
        return np.sign(draw_real(rng, count))

    def draw_classes(rng, count):
        rows = count if batch is None else batch
        return rng.integers(0, classes, (rows, *prediction[:-1]))

    if isinstance(loss, SoftmaxCrossEntropy):
        return draw_classes
    if isinstance(loss, LogisticLoss | ExponentialLoss):
        return draw_signs
    for draw in (draw_real, draw_classes):
        if _accepts_targets(loss, prediction, draw(np.random.default_rng(0), 1)):
            return draw
    return draw_real


def _accepts_targets(loss, prediction: tuple[int, ...], targets: np.ndarray) -> bool:
    """Whether a loss of one prediction and one target is a number."""
    try:
        target = jax.eval_shape(lambda y: y[0], targets)
        guess = jax.ShapeDtypeStruct(prediction, jnp.float64)
        return eqx.filter_eval_shape(loss, guess, target).shape == ()
    except (TypeError, ValueError, AssertionError):
        return False


def _draw_weights(rng: np.random.Generator, leaf, size: float) -> np.ndarray:
    fan_in = leaf.size / leaf.shape[0] if leaf.ndim > 1 and leaf.shape[0] else 1.0
    return size * rng.standard_normal(leaf.shape) / np.sqrt(max(fan_in, 1.0))


def _draw_data(rng: np.random.Generator, leaf, spread: float, batch) -> Any:
    if not (eqx.is_array(leaf) or isinstance(leaf, np.ndarray)):
        return leaf
    shape = (*batch, *leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return spread * rng.standard_normal(shape)
    if leaf.dtype == bool:
        return rng.integers(0, 2, shape).astype(bool)
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf
    values = np.asarray(leaf)
    low, high = min(int(values.min(initial=0)), 0), int(values.max(initial=0))
    return rng.integers(low, high + 1, shape).astype(leaf.dtype)


def _is_finite(tree: PyTree) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
