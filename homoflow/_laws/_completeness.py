"""`certify`: whether a list of laws is complete."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, Scalar

from .._problem._losses import LossLike, SquaredLoss
from .._problem._trainable import Trainable, trainable_mask
from ._law import Law, Laws
from ._laws import laws as find_laws
from .search._null_space import normalize_rows, orthonormal_basis
from .search._quadratic_laws import quadratic_laws
from .search._random_points import probe_loss, probe_objective
from .search._vectorized import VectorizedProblem

#: The most parameters for which a certificate is within reach, and the deepest brackets.
_MAX_PARAMETERS, _MAX_DEPTH = 100, 5
#: How many generic weights, and brackets for each parameter, are tried.
_NUM_POINTS, _NUM_PER_PARAMETER = 4, 2
#: Up to this size, relative to the terms that cancel in it, a bracket is rounding;
_CANCELLATION = 1e-5
#: and up to this size, relative to the largest of the brackets.
_MIN_SIZE = 1e-6


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How many conservation laws there are, against how many are known.

    - `laws`: the known laws.
    - `parameters`: D, the number of trained parameters.
    - `rank`: how many independent functions the known laws are: the rank of their
        gradients at generic weights. There are at least as many laws as that.
    - `bound`: D − dim Lie. There are no more laws than that, up to numerical rank.
    - `depth`: of the deepest brackets that were needed.
    - `is_closed`: whether deeper brackets add nothing, so that `bound` is sharp.
    - `scope`: what the laws have to hold for.
    """

    laws: Laws
    parameters: int
    rank: int
    bound: int
    depth: int
    is_closed: bool
    scope: str

    @property
    def missing(self) -> int:
        """How many laws there may be that are not known."""
        return self.bound - self.rank

    @property
    def is_complete(self) -> bool:
        """Whether every law is a function of the known ones."""
        return self.missing == 0

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        if self.is_complete:
            return f"complete: there are exactly {self.rank} independent laws"
        if self.missing < 0:
            return (
                f"contradictory: {self.rank} laws against a bound of {self.bound}; the "
                "numerical ranks cannot be trusted"
            )
        if self.is_closed:
            return (
                f"incomplete: {self.missing} of {self.bound} laws are missing (there "
                "may be no quadratic ones left)"
            )
        return (
            f"undecided: {self.rank} laws are known, and there are at most {self.bound}; "
            f"deeper brackets than {self.depth} could lower the bound"
        )

    def __repr__(self) -> str:
        return (
            f"Certificate({self.verdict}; {self.parameters} parameters, rank of the "
            f"known laws {self.rank}, D − dim Lie = {self.bound} from brackets up to "
            f"depth {self.depth}, for {self.scope})"
        )


def certify(
    model: PyTree,
    x_example: PyTree | None = None,
    loss: LossLike = SquaredLoss(),  # noqa: B008
    *,
    objective: Callable[[PyTree, PyTree], Scalar] | None = None,
    trainable: Trainable = None,
    batched: bool = False,
    data: tuple[Any, Any] | None = None,
    laws: Laws | None = None,
) -> Certificate:
    """Whether the laws of a small model are all there are.

    With the vector fields X = ∇_w ℓ(f_w(x), y) for all x and y, there are D − dim Lie{X}
    laws at generic weights [Marcotte, Gribonval & Peyré 2023]. The dimension is found
    from nested brackets [X, Y] = DY·X − DX·Y, which are Hessian-vector products, at
    several random weights. The largest counts, as a dead unit would make laws of its own.

    **Arguments:** as for `homoflow.laws`, and

    - `data`: `(x, y)`, samples along the first axis: ask for the laws of gradient flow
        on any weighting of these samples only. There are more of them, and they are not
        searched for among all functions, only among quadratic ones.
    - `laws`: the known laws; by default those that `homoflow.laws` finds, and if they
        are too few, quadratic ones from a numerical search.

    **Returns:** a `homoflow.Certificate`. `verdict` is the answer in a sentence.

    **Raises:** `ValueError` for more than 100 parameters, or without `x_example`.

    ```python
    model = hf.MLP((2, 3, 1), key=jax.random.key(0))
    print(hf.certify(model, jnp.ones(2)).verdict)
    # complete: there are exactly 3 independent laws
    ```
    """
    mask = trainable_mask(model, trainable)
    if x_example is None and data is not None:
        x_example = jax.tree.map(lambda leaf: leaf[0], data[0])
    if x_example is None:
        raise ValueError("Pass `x_example`, one input sample.")
    if objective is None:
        probe = probe_loss(model, mask, x_example, loss, batched=batched, samples=1)
    else:
        probe = probe_objective(model, mask, x_example, objective)
    problem = VectorizedProblem(dataclasses.replace(probe, given=data))
    if problem.size > _MAX_PARAMETERS:
        raise ValueError(
            f"The model has {problem.size} trained parameters; a certificate is out of "
            f"reach for more than {_MAX_PARAMETERS}."
        )
    known = laws
    if known is None:
        known = find_laws(
            model,
            x_example,
            loss,
            objective=objective,
            trainable=mask,
            batched=batched,
        )
    rank = functional_rank(problem, known.items)
    dimension, depth, is_closed = lie_dimension(problem, enough=problem.size - rank)
    if laws is None and rank < problem.size - dimension:
        known = Laws(
            known.items + quadratic_laws(problem, known.items),
            known.note,
            known.approximate,
        )
        rank = functional_rank(problem, known.items)
    return Certificate(
        laws=known,
        parameters=problem.size,
        rank=rank,
        bound=problem.size - dimension,
        depth=depth,
        is_closed=is_closed,
        scope="this data set only" if data is not None else "any data",
    )


def functional_rank(problem: VectorizedProblem, laws: tuple[Law, ...]) -> int:
    """How many independent functions laws are: the rank of their gradients."""
    weights, _ = problem.draw(_NUM_POINTS, seed=11)
    return max(numerical_rank(problem.jacobian(laws, w)) for w in weights)


def lie_dimension(problem: VectorizedProblem, enough: int) -> tuple[int, int, bool]:
    """dim Lie at generic weights, the depth of brackets needed, and whether it is final.

    Stops when `enough` is reached, or when a deeper bracket adds nothing at any of the
    points: the distribution is then closed under brackets with its generators.
    """
    count = _NUM_PER_PARAMETER * problem.size + 8
    fields = _brackets(problem)
    weights, _ = problem.draw(_NUM_POINTS, seed=12)
    spans = [np.zeros((0, problem.size)) for _ in weights]
    ranks = [0] * len(weights)
    for depth in range(1, _MAX_DEPTH + 1):
        before = list(ranks)
        for i, w in enumerate(weights):
            data = [
                problem.draw(count, seed=1000 * (depth * _NUM_POINTS + i) + k)[1]
                for k in range(depth)
            ]
            spans[i] = orthonormal_basis(np.concatenate([spans[i], fields(w, data)]))
            ranks[i] = len(spans[i])
        if max(ranks) >= enough:
            return max(ranks), depth, True
        if ranks == before:
            return max(ranks), depth - 1, True
    return max(ranks), _MAX_DEPTH, False


def numerical_rank(rows: np.ndarray) -> int:
    """The rank of vectors, each taken at length one."""
    return len(orthonormal_basis(normalize_rows(rows)))


def _brackets(problem: VectorizedProblem) -> Callable[[Any, list[Any]], np.ndarray]:
    """(weights, data for each level) ↦ many brackets [X_1, [X_2, … X_d]], one a row.

    They have length one, except those that are no more than rounding, which are shorter.
    """
    compiled = jax.jit(
        jax.vmap(lambda w, levels: _bracket(problem, w, levels), in_axes=(None, 0))
    )

    def evaluate(w, levels):
        with jax.enable_x64(True):
            rows, scales = map(np.asarray, compiled(w, levels))
        finite = np.isfinite(rows).all(axis=1) & np.isfinite(scales)
        rows, scales = rows[finite], scales[finite]
        floor = np.maximum(
            _CANCELLATION * scales, _MIN_SIZE * np.max(scales, initial=0.0)
        )
        lengths = np.maximum(np.linalg.norm(rows, axis=1), floor)
        return rows[lengths > 0] / lengths[lengths > 0, None]

    return evaluate


def _bracket(problem: VectorizedProblem, w: Any, levels: list[Any]) -> tuple[Any, Any]:
    """A nested bracket, and the size that it would have without cancellation."""

    def outer(v):
        return problem.gradient(v, levels[0])

    if len(levels) == 1:
        value = outer(w)
        return value, jnp.linalg.norm(value)

    def inner(v):
        return _bracket(problem, v, levels[1:])[0]

    x, (y, inner_scale) = outer(w), _bracket(problem, w, levels[1:])
    first = jax.jvp(inner, (w,), (x,))[1]
    second = jax.jvp(outer, (w,), (y,))[1]
    scale = jnp.linalg.norm(first) + jnp.linalg.norm(second)
    scale = scale + inner_scale * jnp.linalg.norm(x) / jnp.linalg.norm(w)
    return first - second, scale
