"""`certify`: whether a list of laws is complete."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree, Scalar

from .._problem._losses import LossLike, SquaredLoss
from .._problem._trainable import Trainable, trainable_mask
from ._example import check_example
from ._law import Law, Laws
from ._laws import laws as find_laws
from ._lie_dimension import lie_dimension, numerical_rank
from .search._quadratic_laws import MAX_EXHAUSTIVE, quadratic_laws
from .search._random_points import probe_loss, probe_objective
from .search._vectorized import VectorizedProblem

#: The most parameters for which a certificate is within reach, and for which every
#: quadratic law is searched for.
_MAX_PARAMETERS, _MAX_EXHAUSTIVE = 100, 60
#: How many generic weights laws are counted at, and certified at, with so many samples.
_NUM_POINTS, _NUM_CERTIFIED, _NUM_SAMPLES = 4, 12, 8


@dataclasses.dataclass(frozen=True)
class Certificate:
    """How many conservation laws there are, against how many are known.

    - `laws`: the known laws.
    - `parameters`: D, the number of trained parameters.
    - `rank`: how many independent functions the known laws are: the rank of their
        gradients at generic weights. There are at least as many laws as that.
    - `existing`: how many independent laws there are for certain: those known, and any
        others that `homoflow.laws` or a search among quadratic ones finds.
    - `bound`: D − dim Lie. There are no more laws than that, up to numerical rank.
    - `depth`: of the deepest brackets that were needed.
    - `is_closed`: whether there is proof that `bound` is sharp: deeper brackets add
        nothing, and the rank is the same at all weights, without singular values of which
        it is unclear whether they are 0. Never so where the function has kinks, unless
        there are as many laws.
    - `scope`: what the laws have to hold for.
    """

    laws: Laws
    parameters: int
    rank: int
    existing: int
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
        return self.missing == 0 and self.bound < self.parameters

    @property
    def verdict(self) -> str:
        """The result in a sentence."""
        if self.bound == self.parameters:
            return (
                "undecided: at no random weights and data does a gradient flow, which "
                "proves nothing"
            )
        if self.is_complete:
            return f"complete: there are exactly {self.rank} independent laws"
        if self.missing < 0:
            return (
                f"contradictory: {self.rank} laws against a bound of {self.bound}; one "
                "of them is none, or the numerical ranks cannot be trusted"
            )
        if self.is_closed:
            return (
                f"incomplete: {self.missing} of {self.bound} laws are missing (there "
                "may be no quadratic ones left)"
            )
        if self.rank < self.existing:
            return (
                f"incomplete: at least {self.existing - self.rank} laws are missing, of "
                f"at most {self.bound}"
            )
        return (
            f"undecided: {self.rank} laws are known, and there are at most {self.bound}; "
            "other weights or deeper brackets could lower the bound"
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

    **Raises:** `ValueError` for more than 100 parameters, without `x_example`, or
    if the model cannot be called with it.

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
        check_example(model, x_example, batched=batched)
        probe = probe_loss(model, mask, x_example, loss, batched=batched, samples=1)[0]
    else:
        probe = probe_objective(model, mask, x_example, objective)
    problem = VectorizedProblem(dataclasses.replace(probe, given=data))
    if problem.size > _MAX_PARAMETERS:
        raise ValueError(
            f"The model has {problem.size} trained parameters; a certificate is out of "
            f"reach for more than {_MAX_PARAMETERS}."
        )
    found = find_laws(
        model,
        x_example,
        loss,
        objective=objective,
        trainable=mask,
        batched=batched,
    )
    existing = functional_rank(problem, found.items)
    dimension = lie_dimension(problem, enough=problem.size - existing)
    was_exhaustive = data is None and problem.size <= MAX_EXHAUSTIVE
    if existing < problem.size - dimension.at_least and not was_exhaustive:
        found = _search_further(problem, found)
        existing = functional_rank(problem, found.items)
    known = found if laws is None else laws
    bound = problem.size - dimension.at_least
    return Certificate(
        laws=known,
        parameters=problem.size,
        rank=functional_rank(problem, known.items),
        existing=existing,
        bound=bound,
        depth=dimension.depth,
        is_closed=dimension.is_final or bound == existing,
        scope="this data set only" if data is not None else "any data",
    )


def _search_further(problem: VectorizedProblem, found: Laws) -> Laws:
    """The laws with other quadratic ones that a larger search finds."""
    # Of several samples some still have a gradient where others saturate.
    samples = _NUM_SAMPLES if problem.probe.samples else 0
    probe = dataclasses.replace(problem.probe, samples=samples)
    more = quadratic_laws(
        problem,
        found.items,
        probe.draw_points(_NUM_CERTIFIED),
        max_exhaustive=_MAX_EXHAUSTIVE,
    ).laws
    names = {law.name for law in found}
    renamed = (
        dataclasses.replace(law, name=f"further[{n}]") if law.name in names else law
        for n, law in enumerate(more, 1)
    )
    return Laws((*found.items, *renamed), found.note, found.approximate)


def functional_rank(problem: VectorizedProblem, laws: tuple[Law, ...]) -> int:
    """How many independent functions laws are: the rank of their gradients."""
    weights, _ = problem.draw(_NUM_POINTS, seed=11)
    return max(numerical_rank(problem.jacobian(laws, w))[0] for w in weights)
