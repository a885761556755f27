"""uᵀAv and bᵀu of many laws at once, without computing twice what they share."""

from collections.abc import Iterable

from jaxtyping import Array, Float, PyTree

from ._law import Law

#: From the coarsest to the finest: each is a sum over entries of the next.
_FINENESS = ("total", "units", "matrix")

LawValues = dict[str, Float[Array, "..."]]


def bilinear_forms(laws: Iterable[Law], left: PyTree, right: PyTree) -> LawValues:
    """`law.bilinear(left, right)` of every law, by name.

    Laws of the same terms, such as `matrix[1]`, `neurons[1]` and `layers[1]`, are a
    matrix, its diagonal and its trace: only the first is computed.
    """
    laws = tuple(laws)
    finest = {_sharing_key(law): law for law in finest_laws(laws)}
    computed = {key: law.bilinear(left, right) for key, law in finest.items()}
    return {
        law.name: _coarsen(computed[_sharing_key(law)], finest[_sharing_key(law)], law)
        for law in laws
    }


def finest_laws(laws: Iterable[Law]) -> tuple[Law, ...]:
    """The laws without those that are the diagonal or the trace of another."""
    finest: dict[tuple, Law] = {}
    for law in laws:
        key = _sharing_key(law)
        if key not in finest or _fineness(law) > _fineness(finest[key]):
            finest[key] = law
    return tuple(finest.values())


def first_order_changes(
    laws: Iterable[Law], weights: PyTree, update: PyTree
) -> LawValues:
    """2⟨Aw, u⟩ + bᵀu of every law: how much an update u changes it to first order."""
    laws = tuple(laws)
    forms = bilinear_forms(laws, weights, update)
    return {law.name: 2 * forms[law.name] + law.linear(update) for law in laws}


def _sharing_key(law: Law) -> tuple:
    """A key that is equal for laws of which the finest gives the others."""
    can_share = law.blocks == 1 and not law.entries and law.quadratic_terms
    return law.quadratic_terms if can_share else (law.name,)


def _fineness(law: Law) -> int:
    return _FINENESS.index(law.contraction)


def _coarsen(value: Array, fine: Law, coarse: Law) -> Array:
    if _fineness(coarse) < _fineness(fine) == 2:
        value = value.diagonal()
    return value.sum() if _fineness(coarse) < min(_fineness(fine), 1) else value
