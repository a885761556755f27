"""Families of rescalings, written as laws that a person can read."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from .._law import Law, Path, Term
from ..symmetry import Family, Leaf, Portion


def proposed_laws(families: Sequence[Family], leaves: Sequence[Leaf]) -> list[Law]:
    """One law for each family: the squares of what its units own, with their weights.

    A rescaling w → e^{εS}w that leaves the loss unchanged makes wᵀSw constant.
    """
    return unique_names([_law(family, leaves) for family in families])


def unique_names(laws: Sequence[Law]) -> list[Law]:
    """The same laws, with numbers behind names that occur twice."""
    seen: dict[str, int] = {}
    result = []
    for law in laws:
        count = seen[law.name] = seen.get(law.name, 0) + 1
        name = law.name if count == 1 else f"{law.name}#{count}"
        result.append(renamed(law, name=name))
    return result


def renamed(law: Law, **changes) -> Law:
    """The law with other attributes."""
    fields = {f: getattr(law, f) for f in law.__dataclass_fields__}
    return Law(**(fields | changes))


def path_text(path: Path) -> str:
    """A key path as Python writes it, such as `layers[0].weight`."""
    return jax.tree_util.keystr(path).lstrip(".")


def _law(family: Family, leaves: Sequence[Leaf]) -> Law:
    several = family.units > 1
    terms, signs, texts = [], [], []
    for portion in family.portions:
        leaf = leaves[portion.leaf]
        terms.append(term_of(portion, leaf, family.units))
        signs.append(portion.weight)
        texts.append(_Squares(path_text(leaf.path), _where(portion, leaf, several)))
    first = family.portions[0]
    kind = _kind(first, leaves[first.leaf]) if several else "total"
    return Law(
        f"{kind}[{texts[0].path}]",
        signed_sum(signs, [t.plain() for t in texts]),
        "units" if several else "total",
        tuple(terms),
        tex=signed_sum(signs, [t.tex() for t in texts]).replace("−", "-"),
    )


def _kind(portion: Portion, leaf: Leaf) -> str:
    rank = len(leaf.shape)
    if rank == 1:
        return "entries"
    if len(portion.axes) > 1:
        return "units"
    if portion.axes == (0,):
        return "channels" if rank > 2 else "rows"
    return "columns" if portion.axes == (1,) else "units"


def term_of(portion: Portion, leaf: Leaf, units: int) -> Term:
    """What units own of an array, as a term of a law."""
    shape, index = leaf.shape, portion.index
    if not portion.axes:
        view = (1, math.prod(shape)) if units > 1 else None
        return Term(leaf.path, portion.weight, view=view)
    low, high = portion.axes[0], portion.axes[-1] + 1
    index = _over_neighbours(portion, shape)
    n = math.prod(shape[low:high])
    view = (*shape[:low], n, *shape[high:])
    same = None if view == tuple(shape) else view
    if index.shape == (n, 1) and (index[:, 0] == np.arange(n)).all():
        return Term(leaf.path, portion.weight, low, same)
    if (blocks := _regular(index, n)) is not None:
        before, after = blocks
        split = (
            *((before,) if before > 1 else ()),
            units,
            *((after,) if after > 1 else ()),
        )
        view = (*shape[:low], *split, *shape[high:])
        return Term(leaf.path, portion.weight, low + (before > 1), view)
    rows = tuple(index.reshape(-1).tolist())
    return Term(leaf.path, portion.weight, low, same, rows, units)


def _over_neighbours(portion: Portion, shape: Sequence[int]) -> np.ndarray:
    """The portion's index along all axes between its first and its last."""
    low, high = portion.axes[0], portion.axes[-1] + 1
    if len(portion.axes) == high - low:
        return portion.index
    own = [shape[a] for a in portion.axes]
    labels = np.full(math.prod(own), -1)
    for unit, entries in enumerate(portion.index):
        labels[entries] = unit
    kept = [shape[a] if a in portion.axes else 1 for a in range(low, high)]
    full = np.broadcast_to(labels.reshape(kept), shape[low:high]).reshape(-1)
    return np.stack([np.flatnonzero(full == u) for u in range(len(portion.index))])


def _regular(index: np.ndarray, n: int) -> tuple[int, int] | None:
    """(a, b) if reshaping n to (a, units, b) gives each unit its entries."""
    units, each = index.shape
    if units < 2 or units * each != n:
        return None
    run = np.flatnonzero(np.diff(index[0]) != 1)
    after = int(run[0]) + 1 if len(run) else each
    before = each // after
    expected = np.arange(n).reshape(before, units, after).swapaxes(0, 1)
    return (before, after) if (expected.reshape(units, -1) == index).all() else None


def _where(portion: Portion, leaf: Leaf, several: bool) -> list[str] | None:
    """What stands between the brackets behind the array's name."""
    if not portion.axes:
        return None
    own = _place(portion, several)
    spots = [own if a in portion.axes[:1] else ":" for a in range(len(leaf.shape))]
    for a in portion.axes[1:]:
        spots[a] = "·"
    while spots and spots[-1] == ":" and math.prod(leaf.shape[len(spots) - 1 :]) == 1:
        spots.pop()
    return spots


def _place(portion: Portion, several: bool) -> str:
    """Where a unit, or the only one, sits along an axis."""
    index = portion.index
    if not several:
        first, last = int(index[0, 0]), int(index[0, -1])
        whole = last - first == index.shape[1] - 1 and len(portion.axes) == 1
        return f"{first}:{last + 1}" if whole else "part"
    start = int(index[0, 0])
    if index.shape[1] == 1 and (np.diff(index[:, 0]) == 1).all():
        return f"{start}+i" if start else "i"
    return "part i"


class _Squares:
    """The sum of an array's squares, or of a part of it, as text."""

    def __init__(self, path: str, where: list[str] | None):
        self.path, self.where = path, where

    @property
    def is_single(self) -> bool:
        """Whether it is the square of one number."""
        return (
            self.where is not None
            and len(self.where) == 1
            and (self.where[0].endswith("i") and "part" not in self.where[0])
        )

    def plain(self) -> str:
        if self.where is None:
            return f"‖{self.path}‖²"
        inside = f"{self.path}[{', '.join(self.where)}]"
        return f"{inside}²" if self.is_single else f"‖{inside}‖²"

    def tex(self) -> str:
        name = rf"\mathtt{{{self.path}}}".replace("_", r"\_")
        if self.where is not None:
            spots = [rf"\text{{{s}}}" if "part" in s else s for s in self.where]
            name += f"[{', '.join(spots)}]"
            if self.is_single:
                return f"{name}^2"
        return rf"\lVert {name}\rVert^2"


def signed_sum(weights: Sequence[int], texts: Sequence[str]) -> str:
    """Such as `a + 2b − c`."""
    result = ""
    for weight, text in zip(weights, texts, strict=True):
        size = "" if abs(weight) == 1 else f"{abs(weight)}"
        if not result:
            result = ("−" if weight < 0 else "") + size + text
        else:
            result += (" − " if weight < 0 else " + ") + size + text
    return result
