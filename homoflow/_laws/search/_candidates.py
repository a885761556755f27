"""Families of rescalings, written as laws that a person can read."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .._law import Contraction, Law, Term
from ..symmetry import Leaf, OrbitBlock, ScalingFamily
from ._formula import UNIT, Formula, InnerProduct, Slice, SquaredNorm, path_text


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A quantity that the structure of a model conserves, for all units of a family.

    - `kind`, `label`: its name in two parts, such as `rows` and `[layers[0].weight]`.
    - `terms`: of the law; `slices`: what a unit owns of their arrays, in their order.
    - `has_units`: whether the law is a vector over units, not a single number.
    """

    kind: str
    label: str
    terms: tuple[Term, ...]
    slices: tuple[Slice, ...]
    has_units: bool

    def law(self) -> Law:
        """‖…‖² of what each unit owns."""
        return self._make_law(
            self.kind,
            "units" if self.has_units else "total",
            self._formula(SquaredNorm),
        )

    def matrix_law(self, blocks: int) -> Law:
        """⟨…, …⟩ of what each two units own, or each two in one of several blocks."""
        within = "" if blocks == 1 else f", i and j in the same of {blocks} blocks"
        law = self._make_law(
            "matrix" if blocks == 1 else "blocks",
            "matrix",
            self._formula(InnerProduct, within),
        )
        return dataclasses.replace(law, blocks=blocks)

    def restrict(self, units: Sequence[int]) -> "Candidate":
        """The same for some of the units only."""
        is_range = list(units) == list(range(units[0], units[-1] + 1))
        which = f"{units[0]}:{units[-1] + 1}" if is_range else "part"
        place = f"part {UNIT}"
        if is_range:
            place = f"{units[0]}+{UNIT}" if units[0] else UNIT
        return Candidate(
            self.kind,
            f"{self.label}[{which}]",
            tuple(_restrict_term(term, units) for term in self.terms),
            tuple(
                dataclasses.replace(
                    s,
                    places=s.places and tuple(p.replace(UNIT, place) for p in s.places),
                )
                for s in self.slices
            ),
            has_units=True,
        )

    def _make_law(self, kind: str, contraction: Contraction, formula: Formula) -> Law:
        return Law(
            kind + self.label,
            formula.text(),
            contraction,
            self.terms,
            tex=formula.tex(),
        )

    def _formula(
        self, expression: type[SquaredNorm] | type[InnerProduct], remark: str = ""
    ) -> Formula:
        pairs = zip(self.terms, self.slices, strict=True)
        return Formula(tuple((t.coefficient, expression(s)) for t, s in pairs), remark)


def propose_laws(
    families: Sequence[ScalingFamily], leaves: Sequence[Leaf]
) -> list[Candidate]:
    """One law for each family: the squares of what its units own, with their weights.

    A rescaling w → e^{εS}w that leaves the loss unchanged makes wᵀSw constant.
    """
    candidates = [_make_candidate(family, leaves) for family in families]
    names = number_repeated([c.kind + c.label for c in candidates])
    return [
        dataclasses.replace(c, label=name.removeprefix(c.kind))
        for c, name in zip(candidates, names, strict=True)
    ]


def make_names_unique(laws: Sequence[Law]) -> list[Law]:
    """The same laws, with numbers behind names that occur twice."""
    names = number_repeated([law.name for law in laws])
    return [
        dataclasses.replace(law, name=name)
        for law, name in zip(laws, names, strict=True)
    ]


def number_repeated(names: Sequence[str]) -> list[str]:
    """`a`, `a#2`, `a#3` for names that occur several times."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def _make_candidate(family: ScalingFamily, leaves: Sequence[Leaf]) -> Candidate:
    has_units = family.units > 1
    first = family.blocks[0]
    return Candidate(
        _kind(first, leaves[first.leaf]) if has_units else "total",
        f"[{path_text(leaves[first.leaf].path)}]",
        tuple(make_term(b, leaves[b.leaf], family.units) for b in family.blocks),
        tuple(_make_slice(b, leaves[b.leaf], has_units) for b in family.blocks),
        has_units,
    )


def _kind(block: OrbitBlock, leaf: Leaf) -> str:
    rank = len(leaf.shape)
    if rank == 1:
        return "entries"
    if len(block.axes) > 1:
        return "units"
    if block.axes == (0,):
        return "channels" if rank > 2 else "rows"
    return "columns" if block.axes == (1,) else "units"


def _restrict_term(term: Term, units: Sequence[int]) -> Term:
    if term.index is None:
        return dataclasses.replace(term, index=tuple(units), units=len(units))
    rows = np.asarray(term.index).reshape(term.units, -1)[list(units)]
    return dataclasses.replace(
        term, index=tuple(rows.reshape(-1).tolist()), units=len(units)
    )


def make_term(block: OrbitBlock, leaf: Leaf, units: int) -> Term:
    """What units own of an array, as a term of a law."""
    shape, index = leaf.shape, block.index
    if not block.axes:
        view = (1, math.prod(shape)) if units > 1 else None
        return Term(leaf.path, block.weight, view=view)
    low, high = block.axes[0], block.axes[-1] + 1
    index = _index_all_between(block, shape)
    n = math.prod(shape[low:high])
    view = (*shape[:low], n, *shape[high:])
    same = None if view == tuple(shape) else view
    if index.shape == (n, 1) and (index[:, 0] == np.arange(n)).all():
        return Term(leaf.path, block.weight, low, same)
    if (blocks := _as_reshape(index, n)) is not None:
        before, after = blocks
        split = (
            *((before,) if before > 1 else ()),
            units,
            *((after,) if after > 1 else ()),
        )
        view = (*shape[:low], *split, *shape[high:])
        return Term(leaf.path, block.weight, low + (before > 1), view)
    rows = tuple(index.reshape(-1).tolist())
    return Term(leaf.path, block.weight, low, same, rows, units)


def _index_all_between(block: OrbitBlock, shape: Sequence[int]) -> np.ndarray:
    """The block's index along all axes between its first and its last."""
    low, high = block.axes[0], block.axes[-1] + 1
    if len(block.axes) == high - low:
        return block.index
    own = [shape[a] for a in block.axes]
    labels = np.full(math.prod(own), -1)
    for unit, entries in enumerate(block.index):
        labels[entries] = unit
    kept = [shape[a] if a in block.axes else 1 for a in range(low, high)]
    full = np.broadcast_to(labels.reshape(kept), shape[low:high]).reshape(-1)
    return np.stack([np.flatnonzero(full == u) for u in range(len(block.index))])


def _as_reshape(index: np.ndarray, n: int) -> tuple[int, int] | None:
    """(a, b) if reshaping n to (a, units, b) gives each unit its entries."""
    units, each = index.shape
    if units < 2 or units * each != n:
        return None
    run = np.flatnonzero(np.diff(index[0]) != 1)
    after = int(run[0]) + 1 if len(run) else each
    before = each // after
    expected = np.arange(n).reshape(before, units, after).swapaxes(0, 1)
    return (before, after) if (expected.reshape(units, -1) == index).all() else None


def _make_slice(block: OrbitBlock, leaf: Leaf, has_units: bool) -> Slice:
    """What stands between the brackets behind the array's name."""
    if not block.axes:
        return Slice(leaf.path, None)
    own = _place_along_axis(block, has_units)
    places = [own if a in block.axes[:1] else ":" for a in range(len(leaf.shape))]
    for a in block.axes[1:]:
        places[a] = "·"
    while places[-1] == ":" and math.prod(leaf.shape[len(places) - 1 :]) == 1:
        places.pop()
    return Slice(leaf.path, tuple(places))


def _place_along_axis(block: OrbitBlock, has_units: bool) -> str:
    """Where a unit, or the only one, sits along an axis."""
    index = block.index
    if not has_units:
        first, last = int(index[0, 0]), int(index[0, -1])
        is_range = last - first == index.shape[1] - 1 and len(block.axes) == 1
        return f"{first}:{last + 1}" if is_range else "part"
    start = int(index[0, 0])
    if index.shape[1] == 1 and (np.diff(index[:, 0]) == 1).all():
        return f"{start}+{UNIT}" if start else UNIT
    return f"part {UNIT}"
