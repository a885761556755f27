"""`balance`: the network of least norm that computes the same function."""

import dataclasses
import warnings
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._jax._tracing import is_concrete, known_finite
from .._laws import Law, laws
from .._laws._law import Path, contract, leaf_at, rows_of
from ._balanced_factors import balance_chain, balance_factors
from ._balanced_newton import balance_by_newton, meets_itself
from ._balanced_scales import balance_scales
from ._generating_laws import generating_laws, laws_of_entries, names_of_some

#: Sweeps over the laws, which converge linearly where matrix laws meet other laws, and
#: the imbalance, relative to the squares that cancel, at which they end.
_MAX_SWEEPS, _BALANCED, _STALLED = 3000, 2e-15, 2e-13


def balance(model: PyTree, x_example: PyTree | None = None) -> PyTree:
    """The network of least ‖w‖² among the rescalings of `model`: same function, no laws.

    Where an activation is positively homogeneous, a unit's weights may be moved from
    its inputs to its outputs without changing what the network computes; where it is
    the identity, units may be mixed by any invertible matrix. Among all these networks
    the one of least ‖w‖² is balanced: all quadratic laws of `homoflow.laws` are 0 (but for
    those that only a search finds, entry by entry; a warning names them),
    ‖W_h[i,:]‖² = k‖W_{h+1}[:,i]‖² at units of degree k and W_h W_hᵀ = W_{h+1}ᵀ W_{h+1}
    at linear ones [Kempf & Ness 1979]. It is found by Newton's method and singular value
    decompositions, in float64, and returned in the model's dtype.

    Where there is no least one, only an infimum, it is the limit: the weights of a unit
    that has no input, or no output, go to 0, and linear layers get the rank of their
    product. Networks balanced already come back unchanged but for rounding.

    **Arguments:**

    - `model`: one of homoflow's models, or any Equinox module that `homoflow.laws` finds
        laws of.
    - `x_example`: one input sample; needed to find the laws of other models.

    **Returns:** a model of the same structure. Laws and f(x) are good to rounding, in
    float64, relative to the weights' squares and to the products that f sums up.

    **Raises:** `ValueError` if the model has no such law (tanh, a single layer), if
    weights can be made arbitrarily small (in front of a normalization), if they are not
    finite, or are being traced by jit or vmap.

    ```python
    model = hf.MLP((3, 8, 8, 1), key=jax.random.key(0))
    balanced = hf.balance(model)
    print(hf.laws(balanced)["neurons[1]"].value(balanced))  # zeros, to rounding
    ```
    """
    if not is_concrete(model):
        raise ValueError(
            "`balance` needs the weights' values: call it outside of jit and vmap."
        )
    if not known_finite(eqx.filter(model, eqx.is_inexact_array)):
        raise ValueError("The model's weights hold NaN or inf: nothing to balance.")
    found = laws(model, x_example)
    generating, others = generating_laws(found), laws_of_entries(found)
    searched = f"A search found {names_of_some(others)}, entry by entry: "
    if not generating:
        reason = found.note or "The laws found do not come from rescalings."
        if others:
            reason = f"{searched}which units they rescale is not known."
        raise ValueError(f"There is nothing to balance. {reason}")
    _check_twosided(generating)
    if others:
        warnings.warn(
            f"{searched}they stay as they are, and ‖w‖² is least only among rescalings "
            f"behind the other laws, {names_of_some(generating)}.",
            stacklevel=2,
        )
    paths = dict.fromkeys(t.path for law in generating for t in law.quadratic_terms)
    arrays = {p: np.asarray(leaf_at(model, p), np.float64) for p in paths}
    balanced = _replace_arrays(model, _balance(generating, arrays))
    if x_example is not None:
        _check_same_function(model, balanced, x_example)
    return balanced


def _balance(laws: Sequence[Law], arrays: dict) -> dict:
    # Rescaling units first takes away what singular values would be rounded by.
    arrays = balance_scales([_drop_pairs(law) for law in laws], arrays)
    mixing = [law for law in laws if law.contraction == "matrix"]
    if not mixing:
        return arrays
    chain = _chain(laws, arrays)
    if chain is not None:
        return dict(zip(chain, balance_chain([arrays[p] for p in chain]), strict=True))
    if any(meets_itself(law, arrays) for law in mixing):
        return balance_by_newton(laws, arrays, _Stalled(laws))
    scaling = [law for law in laws if law.contraction != "matrix"]
    worst = np.inf
    for _ in range(_MAX_SWEEPS):
        for law in mixing:
            arrays = balance_factors(law, arrays)
        arrays = balance_scales(scaling, arrays)
        before, worst = worst, _imbalance(laws, arrays)
        if worst <= _BALANCED or (worst <= _STALLED and worst > 0.99 * before):
            return arrays
    raise ValueError(
        f"The weights cannot be balanced: after {_MAX_SWEEPS} sweeps over the laws one is "
        f"still violated by {worst:.1g}."
    )


class _Stalled:
    """Whether laws are 0 to rounding, or as near to it as further steps come."""

    def __init__(self, laws: Sequence[Law]):
        self.laws, self.before = laws, np.inf

    def __call__(self, arrays: dict) -> bool:
        worst = _imbalance(self.laws, arrays)
        before, self.before = self.before, worst
        return worst <= _BALANCED or (worst <= _STALLED and worst > 0.5 * before)


def _chain(laws: Sequence[Law], arrays: dict) -> list[Path] | None:
    """The matrices of W_N ⋯ W_1 if the laws are those of such a product and no other."""
    above = {}
    for law in laws:
        terms = [(t.coefficient, t.axis, t.view, t.index) for t in law.quadratic_terms]
        if law.contraction != "matrix" or law.blocks > 1:
            return None
        if terms != [(1, 0, None, None), (-1, 1, None, None)]:
            return None
        below, over = (t.path for t in law.quadratic_terms)
        above[below] = over
    first = [path for path in above if path not in above.values()]
    chain = first[:1]
    while chain and chain[-1] in above:
        chain.append(above[chain[-1]])
    is_whole = set(chain) == set(arrays) and len(chain) == len(laws) + 1
    matrices = all(array.ndim == 2 for array in arrays.values())
    return chain if is_whole and matrices else None


def _drop_pairs(law: Law) -> Law:
    """The law of single units behind a matrix law."""
    if law.contraction != "matrix":
        return law
    return dataclasses.replace(law, contraction="units")


def _imbalance(laws: Sequence[Law], arrays: dict) -> float:
    """The largest law, relative to the squares that cancel in it."""
    worst = 0.0
    for law in laws:
        value, size = 0.0, 0.0
        for term in law.quadratic_terms:
            rows = rows_of(term, arrays[term.path])
            square = contract(law.contraction, law.blocks, rows, rows)
            value = value + term.coefficient * square
            size = size + abs(term.coefficient) * np.abs(square)
        if law.contraction == "matrix":
            size = np.max(size, initial=0.0)
        relative = np.abs(value) / np.where(size > 0, size, 1)
        worst = max(worst, float(np.max(relative, initial=0.0)))
    return worst


def _check_twosided(laws: Sequence[Law]) -> None:
    for law in laws:
        if len({t.coefficient > 0 for t in law.quadratic_terms}) == 1:
            raise ValueError(
                f"The weights of {law.formula} can be made arbitrarily small without "
                "changing the function: there is no network of least norm."
            )


def _check_same_function(model: PyTree, balanced: PyTree, x: PyTree) -> None:
    """A limit of rescalings need not compute the same where the function jumps."""
    pairs = zip(
        *(
            [np.asarray(y) for y in jax.tree.leaves(m(x)) if eqx.is_inexact_array(y)]
            for m in (model, balanced)
        ),
        strict=True,
    )
    for before, after in pairs:
        size = np.max(np.abs(before), initial=0.0)
        error = np.max(np.abs(after - before), initial=0.0)
        if error > np.sqrt(np.finfo(before.dtype).eps) * size:
            raise ValueError(
                "The limit of balanced weights computes another function: the model's "
                "output jumps where some of its weights are 0."
            )


def _replace_arrays(model: PyTree, arrays: dict) -> PyTree:
    paths = list(arrays)
    old = [leaf_at(model, path) for path in paths]
    new = [jnp.asarray(arrays[p], a.dtype) for p, a in zip(paths, old, strict=True)]
    return eqx.tree_at(lambda m: [leaf_at(m, path) for path in paths], model, new)
