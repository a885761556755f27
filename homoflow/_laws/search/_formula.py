"""Formulas of laws, as structures that are written out once, as text or as TeX."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from .._law import Path

#: Stands for the letter of a unit in a place, such as `2+{unit}`.
UNIT = "{unit}"


@dataclasses.dataclass(frozen=True)
class Slice:
    """What a unit owns of an array.

    `places` stand between the brackets behind the array's name, one for each axis, with
    `UNIT` for the letter of the unit; `None` for the whole array.
    """

    path: Path
    places: tuple[str, ...] | None

    @property
    def is_entry(self) -> bool:
        """Whether it is a single number."""
        if self.places is None or len(self.places) > 1:
            return False
        return all(p.endswith(UNIT) and "part" not in p for p in self.places)

    def text(self, unit: str = "i") -> str:
        if self.places is None:
            return path_text(self.path)
        places = (place.format(unit=unit) for place in self.places)
        return f"{path_text(self.path)}[{', '.join(places)}]"

    def tex(self, unit: str = "i") -> str:
        if self.places is None:
            return path_tex(self.path)
        places = (place.format(unit=unit) for place in self.places)
        spots = (rf"\text{{{p}}}" if p.startswith("part") else p for p in places)
        return f"{path_tex(self.path)}[{', '.join(spots)}]"


@dataclasses.dataclass(frozen=True)
class SquaredNorm:
    """Of what unit i owns of an array."""

    owned: Slice

    def text(self) -> str:
        owned = self.owned.text()
        return f"{owned}²" if self.owned.is_entry else f"‖{owned}‖²"

    def tex(self) -> str:
        owned = self.owned.tex()
        return f"{owned}^2" if self.owned.is_entry else rf"\lVert {owned}\rVert^2"


@dataclasses.dataclass(frozen=True)
class InnerProduct:
    """Of what units i and j own of an array."""

    owned: Slice

    def text(self) -> str:
        i, j = self.owned.text("i"), self.owned.text("j")
        return f"{i}·{j}" if self.owned.is_entry else f"⟨{i}, {j}⟩"

    def tex(self) -> str:
        i, j = self.owned.tex("i"), self.owned.tex("j")
        return f"{i}{j}" if self.owned.is_entry else rf"\langle {i}, {j}\rangle"


@dataclasses.dataclass(frozen=True)
class SumOverAxes:
    """Σ of an array over some of its axes."""

    path: Path
    rank: int
    axes: tuple[int, ...]

    def text(self) -> str:
        over, entry = self._letters()
        name = path_text(self.path) + entry
        return f"Σ_{over} {name}" if over else name

    def tex(self) -> str:
        over, entry = self._letters()
        name = path_tex(self.path) + entry
        return rf"\sum_{{{over}}} {name}" if over else name

    def _letters(self) -> tuple[str, str]:
        """The letters summed over, and those of all axes in brackets."""
        summed, free = iter("iklmnpqr"), iter("juvwxyzst")
        letters = [next(summed if a in self.axes else free) for a in range(self.rank)]
        over = "".join(letters[a] for a in self.axes)
        return over, f"[{', '.join(letters)}]" if letters else ""


#: A term of a formula without its coefficient.
Expression = SquaredNorm | InnerProduct | SumOverAxes


@dataclasses.dataclass(frozen=True)
class Formula:
    """Σ coefficient · expression, and a remark behind it."""

    terms: tuple[tuple[int, Expression], ...]
    remark: str = ""

    def text(self) -> str:
        """Such as `‖a‖² + 2‖b‖² − ‖c‖²`."""
        return self._write([e.text() for _, e in self.terms]) + self.remark

    def tex(self) -> str:
        return self._write([e.tex() for _, e in self.terms]).replace("−", "-")

    def _write(self, expressions: Sequence[str]) -> str:
        result = ""
        for (c, _), expression in zip(self.terms, expressions, strict=True):
            size = "" if abs(c) == 1 else f"{abs(c)}"
            if result:
                result += (" − " if c < 0 else " + ") + size + expression
            else:
                result = ("−" if c < 0 else "") + size + expression
        return result


def path_text(path: Path) -> str:
    """A key path as Python writes it, such as `layers[0].weight`."""
    return jax.tree_util.keystr(path).lstrip(".")


def path_tex(path: Path) -> str:
    return rf"\mathtt{{{path_text(path)}}}".replace("_", r"\_")


def write_polynomial(terms: Sequence[tuple[float, str]], max_terms: int) -> str:
    """Such as `2·a² − b·c + … (9 terms)`, for terms with any coefficients."""
    shown = " ".join(_signed(terms[:max_terms])).removeprefix("+ ")
    return shown + (f" + … ({len(terms)} terms)" if len(terms) > max_terms else "")


def _signed(terms: Sequence[tuple[float, str]]) -> Iterator[str]:
    for c, expression in terms:
        size = "" if abs(c) == 1 else f"{abs(c):g}·"
        yield f"{'−' if c < 0 else '+'} {size}{expression}"
