"""Random targets of the kinds that a loss takes."""

import itertools
import warnings
from collections.abc import Callable, Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..._problem._losses import (
    AbstractLoss,
    ExponentialLoss,
    HuberLoss,
    LogisticLoss,
    SoftmaxCrossEntropy,
    SquaredLoss,
)

#: Random targets, given a generator and the leading axes (samples, rows of a batch).
DrawTargets = Callable[[np.random.Generator, tuple[int, ...]], PyTree]
Shape = tuple[int, ...]

#: How many random predictions and targets tell whether a loss has a gradient at all.
_NUM_TRIED = 6
#: The most combinations of kinds that are tried for a prediction of several arrays.
_MAX_COMBINATIONS = 64
#: What a loss raises at a target that it does not take.
_REFUSALS = (
    TypeError,
    ValueError,
    AssertionError,
    IndexError,
    KeyError,
    AttributeError,
)


def target_kinds(loss: Callable, prediction: PyTree) -> list[DrawTargets]:
    """Targets that a loss takes for a prediction (its shapes), with a gradient.

    At most one kind with real numbers and one of integers only, the first to be preferred.
    Of a loss that turns targets into one-hot vectors, real targets are accepted too, but
    its gradient is then 0: such a kind proves nothing, and is not among them.
    """
    if isinstance(loss, AbstractLoss) and not hasattr(prediction, "shape"):
        raise ValueError(
            f"{type(loss).__name__} takes a prediction that is one array, and this model "
            "returns several: write a loss of your own for them."
        )
    if isinstance(loss, SoftmaxCrossEntropy):
        return [_integers(prediction.shape[:-1], prediction.shape[-1])]
    if isinstance(loss, LogisticLoss | ExponentialLoss):
        return [_signs(prediction.shape)]
    if isinstance(loss, SquaredLoss | HuberLoss):
        return [_reals(prediction.shape)]
    found: dict[bool, DrawTargets] = {}
    for is_integer, draw in _candidates(prediction):
        if is_integer not in found and _has_gradient(loss, prediction, draw):
            found[is_integer] = draw
    if not found:
        raise ValueError(
            "No target was found for which the loss is a number with a gradient: real "
            "numbers of the prediction's shape, class indices and single numbers were "
            "tried. Pass `objective`, a function of the model and its data, and an "
            "example of these data as `x_example`."
        )
    return list(found.values())


def _candidates(prediction: PyTree) -> Iterator[tuple[bool, DrawTargets]]:
    """Kinds of targets to try, and whether they are integers throughout."""
    leaves, structure = jax.tree.flatten(prediction)
    kinds = [list(_kinds_of_array(leaf.shape)) for leaf in leaves]
    if len(leaves) > 1:
        kinds = [of_leaf[:2] for of_leaf in kinds]
    for combination in itertools.islice(itertools.product(*kinds), _MAX_COMBINATIONS):
        draws = [draw for _, draw in combination]
        yield all(i for i, _ in combination), _together(structure, draws)
    if len(leaves) > 1:  # One target for all.
        yield from (kind for of_leaf in kinds for kind in of_leaf)


def _kinds_of_array(shape: Shape) -> Iterator[tuple[bool, DrawTargets]]:
    classes = shape[-1] if shape else 1
    yield False, _reals(shape)
    yield True, _integers(shape[:-1], max(classes, 2))
    yield False, _reals(shape[:-1])
    yield True, _integers(shape, 2)
    if len(shape) > 1:
        yield True, _integers(shape[1:], shape[0])
        yield False, _reals(())
        yield True, _integers((), max(classes, 2))
    if shape != (1,):
        yield False, _reals((1,))


def _together(structure, draws: list[DrawTargets]) -> DrawTargets:
    def draw(rng: np.random.Generator, leading: Shape) -> PyTree:
        return jax.tree.unflatten(structure, [d(rng, leading) for d in draws])

    return draw


def _reals(shape: Shape) -> DrawTargets:
    return lambda rng, leading: rng.standard_normal((*leading, *shape))


def _signs(shape: Shape) -> DrawTargets:
    return lambda rng, leading: np.sign(rng.standard_normal((*leading, *shape)))


def _integers(shape: Shape, count: int) -> DrawTargets:
    return lambda rng, leading: rng.integers(0, count, (*leading, *shape))


def _has_gradient(loss: Callable, prediction: PyTree, draw: DrawTargets) -> bool:
    """Whether the loss takes such targets, and its gradient is not 0 at all of them."""
    rng = np.random.default_rng(5)
    guesses = jax.tree.map(
        lambda leaf: rng.standard_normal((_NUM_TRIED, *leaf.shape)), prediction
    )
    targets = draw(rng, (_NUM_TRIED,))
    guess = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64), prediction
    )
    try:
        with warnings.catch_warnings():
            # Of targets that it will not get, a user need not hear.
            warnings.simplefilter("ignore")
            gradients = _gradients_of_loss(loss, guess, guesses, targets)
    except _REFUSALS:
        return False
    return any(
        bool(np.any(np.isfinite(g) & (g != 0)))
        for g in map(np.asarray, jax.tree.leaves(gradients))
    )


def _gradients_of_loss(loss: Callable, guess, guesses, targets) -> PyTree:
    """The loss's gradients with respect to predictions; nothing if it is no number."""
    target = jax.eval_shape(lambda y: jax.tree.map(lambda a: a[0], y), targets)
    if eqx.filter_eval_shape(loss, guess, target).shape != ():
        return ()
    return jax.jit(jax.vmap(jax.grad(loss)))(guesses, targets)
