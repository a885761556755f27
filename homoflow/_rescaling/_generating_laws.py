"""Which laws generate rescalings of the weights, each of them once."""

from collections.abc import Iterable

from .._laws._bilinear_forms import finest_laws
from .._laws._law import Law


def generating_laws(laws: Iterable[Law]) -> tuple[Law, ...]:
    """The laws wᵀAw whose symmetries w → e^{sA}w are rescalings of whole units.

    Of laws that are a matrix, its diagonal and its trace the matrix stays. Linear laws
    generate translations, and single entries have no rescaling of their own.
    """
    return tuple(
        law
        for law in finest_laws(laws)
        if law.quadratic_terms
        and not law.linear_terms
        and not law.entries
        and law.violation is None
    )


def laws_of_entries(laws: Iterable[Law]) -> tuple[Law, ...]:
    """The quadratic laws that a numerical search has found, entry by entry.

    Which rescaling is behind one is not known: nothing is restored or balanced by them.
    """
    return tuple(
        law for law in laws if any(not share.is_linear for share in law.entries)
    )


def names_of_some(laws: Iterable[Law], most: int = 3) -> str:
    """The laws' names; of many the first, and how many there are."""
    names = [law.name for law in laws]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
