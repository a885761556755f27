"""What a conservation law is: a quadratic (or linear) function of the weights."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from jaxtyping import Array, Float, PyTree

Contraction = Literal["total", "units", "matrix"]
Path = tuple[Any, ...]


class Term(eqx.Module):
    """One array's share of a law, with its position in the model.

    - `path`: JAX key path from the model to the array.
    - `coefficient`: what the array's products are multiplied by.
    - `axis`: the axis that counts units (ignored in a total).
    - `view`: the shape to which the array is reshaped first, where units are not an axis
        of their own.
    - `index`: the rows along the axis that belong to the units, in the order of the units
        and equally many for each; by default all rows, one for each unit.
    - `units`: how many units there are; needed with `index` only.
    """

    path: Path = eqx.field(static=True)
    coefficient: int = eqx.field(static=True)
    axis: int = eqx.field(static=True, default=0)
    view: tuple[int, ...] | None = eqx.field(static=True, default=None)
    index: tuple[int, ...] | None = eqx.field(static=True, default=None)
    units: int = eqx.field(static=True, default=1)

    def rows(self, model: PyTree):
        """The array as a matrix with one row for each unit."""
        return rows_of(self, leaf_at(model, self.path))

    def absolute(self) -> "Term":
        """The term with the absolute value of its coefficient."""
        return dataclasses.replace(self, coefficient=abs(self.coefficient))


class Entries(eqx.Module):
    """Single entries' share of a law: Σ_k c_k·u[i_k]·v[j_k], or Σ_k c_k·u[i_k].

    - `path`, `index`: the array u, and flat indices into it.
    - `other_path`, `other_index`: the same for v; `None` in a linear share.
    - `coefficients`: the c_k.
    """

    path: Path = eqx.field(static=True)
    index: tuple[int, ...] = eqx.field(static=True)
    coefficients: tuple[float, ...] = eqx.field(static=True)
    other_path: Path | None = eqx.field(static=True, default=None)
    other_index: tuple[int, ...] = eqx.field(static=True, default=())

    @property
    def is_linear(self) -> bool:
        return self.other_path is None

    def absolute(self) -> "Entries":
        """The share with the absolute values of its coefficients."""
        sizes = tuple(map(abs, self.coefficients))
        return dataclasses.replace(self, coefficients=sizes)

    def product(self, left: PyTree, right: PyTree):
        """The share, as a symmetric bilinear form; of `right` alone if it is linear."""
        if self.other_path is None:
            chosen = leaf_at(right, self.path).reshape(-1)[np.asarray(self.index)]
            return (np.asarray(self.coefficients, chosen.dtype) * chosen).sum()
        total = 0
        for first, second in ((left, right), (right, left)):
            u = leaf_at(first, self.path).reshape(-1)[np.asarray(self.index)]
            v = leaf_at(second, self.other_path).reshape(-1)
            v = v[np.asarray(self.other_index)]
            total = total + (np.asarray(self.coefficients, u.dtype) / 2 * u * v).sum()
        return total


class Law(eqx.Module):
    """h(w) = wᵀAw + bᵀw, constant along gradient flow, as the paper prints it (no ½).

    A and b are kept as a few structured terms, never as matrices over all weights. One
    object holds all laws of a kind between two layers: its value is a scalar, a vector
    over units or a symmetric matrix over pairs of units.

    - `name`: short and unique in the model, such as `neurons[1]`.
    - `formula`: what it is, in the paper's letters.
    - `quadratic_terms`, `linear_terms`: A and b; `entries`: more of both, entry by entry.
    - `blocks`: for a matrix over pairs of units, how many blocks the units come in, such
        as the heads of an attention layer; only pairs within a block are in the value.
    - `violation`: `None` for a law. Otherwise the quantity is conserved only
        approximately, and this is its largest measured |⟨2Aw + b, ∇L⟩|, relative to the
        size of the terms that cancel.
    """

    name: str = eqx.field(static=True)
    formula: str = eqx.field(static=True)
    contraction: Contraction = eqx.field(static=True)
    quadratic_terms: tuple[Term, ...]
    linear_terms: tuple[Term, ...] = ()
    blocks: int = eqx.field(static=True, default=1)
    tex: str = eqx.field(static=True, default="")
    violation: float | None = eqx.field(static=True, default=None)
    entries: tuple[Entries, ...] = ()

    def value(self, model: PyTree) -> Float[Array, "..."]:
        """wᵀAw + bᵀw of `model`'s weights, in their dtype; under jit and vmap too."""
        return self.bilinear(model, model) + self.linear(model)

    def shape(self, model: PyTree) -> tuple[int, ...]:
        """The shape of the value: of a number, of units, or of pairs of units."""
        if self.contraction == "total":
            return ()
        term = (*self.quadratic_terms, *self.linear_terms)[0]
        units = term.units
        if term.index is None:
            array = leaf_at(model, term.path)
            shape = array.shape if term.view is None else term.view
            units = shape[term.axis] if shape else 1
        if self.contraction == "units":
            return (units,)
        if self.blocks == 1:
            return (units, units)
        size = units // self.blocks
        return (self.blocks, size, size)

    def bilinear(self, left: PyTree, right: PyTree) -> Float[Array, "..."]:
        """uᵀAv of two pytrees of the model's structure, such as weights and gradients.

        With it any step w⁺ = w + u has the exact account
        `value(w⁺) = value(w) + 2·bilinear(w, u) + linear(u) + bilinear(u, u)`.
        """
        products = tuple(self.quadratic_products(left, right))
        return sum(products, start=self._zero(left))

    def bilinear_times(
        self, left: PyTree, right: PyTree, vectors: Float[Array, "units vectors"]
    ) -> Float[Array, "units vectors"]:
        """uᵀAv of a matrix law without blocks, times vectors, without the matrix."""
        total = jnp.zeros_like(vectors)
        for term in self.quadratic_terms:
            u, v = term.rows(left), term.rows(right)
            half = u @ (v.T @ vectors) + v @ (u.T @ vectors)
            total = total + term.coefficient * half / 2
        return total

    def gradient(self, model: PyTree, component: int | tuple[int, ...] = ()) -> PyTree:
        """∇h = 2Aw + b, a pytree of the model's structure (`None` where no array is).

        `component` says of which entry of the value, such as `i` for the law of unit i
        and `(i, j)` for an entry of a matrix law; a scalar law needs none.
        """

        def entry(weights: PyTree) -> Float[Array, ""]:
            value = self.value(weights)[component]
            if value.shape != ():
                raise ValueError(
                    f"The law {self.name} has a value of shape {self.value(model).shape}"
                    ": say of which entry you want the gradient, as `component`."
                )
            return value

        return eqx.filter_grad(entry)(model)

    @property
    def latex(self) -> str:
        """The formula for a paper, without dollar signs."""
        return self.tex or _to_latex(self.formula)

    def quadratic(self, update: PyTree) -> Float[Array, "..."]:
        """q(u) = uᵀAu: one step of gradient descent adds exactly η²q(g)."""
        return self.bilinear(update, update)

    def linear(self, update: PyTree) -> Float[Array, "..."]:
        """bᵀu; 0 for a law that is purely quadratic."""
        products = tuple(self.linear_products(update))
        return sum(products, start=self._zero(update))

    def quadratic_products(self, left: PyTree, right: PyTree) -> Iterator[Any]:
        """What uᵀAv is the sum of, from trees of arrays of JAX or of NumPy."""
        for term in self.quadratic_terms:
            u, v = leaf_at(left, term.path), leaf_at(right, term.path)
            yield term.coefficient * self.product(term, u, v)
        for entries in self.entries:
            if not entries.is_linear:
                yield entries.product(left, right)

    def linear_products(self, update: PyTree) -> Iterator[Any]:
        """What bᵀu is the sum of."""
        for term in self.linear_terms:
            yield term.coefficient * _linear(self.contraction, term, update)
        for entries in self.entries:
            if entries.is_linear:
                yield entries.product(update, update)

    def paths(self) -> frozenset[Path]:
        """Key paths of the arrays that the law involves."""
        terms = (*self.quadratic_terms, *self.linear_terms, *self.entries)
        others = (e.other_path for e in self.entries if e.other_path is not None)
        return frozenset((*(t.path for t in terms), *others))

    def _zero(self, tree: PyTree) -> Float[Array, ""]:
        first = (*self.quadratic_terms, *self.linear_terms, *self.entries)[0]
        return jnp.zeros((), leaf_at(tree, first.path).dtype)

    def product(self, term: Term, left, right) -> Any:
        """A term's share of uᵀAv without its coefficient, from its array in u and in v."""
        if self.contraction != "matrix" and term.index is None:
            return _sum_units(self.contraction, term, left * right)
        rows = rows_of(term, left), rows_of(term, right)
        return contract(self.contraction, self.blocks, *rows)

    def __repr__(self) -> str:
        return f"<{self.name}: {self._describe()}>"

    def _describe(self) -> str:
        if self.violation is None:
            return self.formula
        return f"{self.formula} (approximately: violated by {self.violation:.1g})"


class Laws(eqx.Module):
    """The conservation laws of a model: an iterable with a length.

    `laws["neurons[1]"]` or `laws[0]` is one of them. `note` says in a sentence why a law
    one might expect is not here; it is empty if there is nothing to say. `approximate`
    are quantities that are nearly conserved, such as the norm of weights in front of a
    normalization with ε > 0. They are not laws, and not counted among them. `large` are
    the names of matrix laws of which a run records a summary only.
    """

    items: tuple[Law, ...]
    note: str = eqx.field(static=True, default="")
    approximate: tuple[Law, ...] = ()
    large: frozenset[str] = eqx.field(static=True, default=frozenset())

    def __iter__(self) -> Iterator[Law]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, which: int | str) -> Law:
        if isinstance(which, int):
            return self.items[which]
        for law in self.items:
            if law.name == which:
                return law
        raise KeyError(
            f"There is no law {which!r}: the names are "
            f"{[law.name for law in self.items]}."
        )

    def values(self, model: PyTree) -> dict[str, Float[Array, "..."]]:
        """The value of every law, by name."""
        return {law.name: law.value(model) for law in self.items}

    @property
    def whole(self) -> "Laws":
        """The laws whose values a run records, all but the large ones."""
        items = tuple(law for law in self.items if law.name not in self.large)
        return dataclasses.replace(self, items=items, large=frozenset())

    def num_values(self, model: PyTree) -> int:
        """How many numbers the values of all laws are."""
        return sum(math.prod(law.shape(model)) for law in self.items)

    def where(self, keep: Iterable[bool], note: str) -> "Laws":
        """Only the laws for which `keep` is true, with a note about the others."""
        items = tuple(law for law, k in zip(self.items, keep, strict=True) if bool(k))
        notes = [self.note] if self.note else []
        if len(items) < len(self.items):
            notes.append(note)
        return Laws(items, " ".join(notes), self.approximate, self.large)

    def __repr__(self) -> str:
        lines = [f"  {law.name}: {law.formula}" for law in self.items]
        lines += [f"  {law.name}: {law._describe()}" for law in self.approximate]
        lines += [f"  ({self.note})"] if self.note else []
        return "\n".join([f"Laws of {len(self)} kinds", *lines])


def leaf_at(tree: PyTree, path: Path) -> Any:
    """The leaf at a JAX key path."""
    for key in path:
        match key:
            case GetAttrKey(name=name):
                tree = getattr(tree, name)
            case SequenceKey(idx=index):
                tree = tree[index]
            case DictKey(key=name) | FlattenedIndexKey(key=name):
                tree = tree[name]
            case _:
                raise TypeError(f"Cannot follow the key {key!r} into a model.")
    return tree


def rows_of(term: Term, array):
    """An array of jax or of numpy as a matrix with one row for each of a term's units."""
    array = array if term.view is None else array.reshape(term.view)
    others = [a for a in range(array.ndim) if a != term.axis]
    if array.ndim == 0:
        return array.reshape(1, 1)
    width = math.prod(array.shape[a] for a in others)
    rows = array.transpose([term.axis, *others]).reshape(array.shape[term.axis], width)
    if term.index is None:
        return rows
    return rows[np.asarray(term.index)].reshape(term.units, -1)


def contract(kind: Contraction, blocks: int, left, right):
    """Products of rows, summed as the kind of law has it."""
    match kind:
        case "total":
            return (left * right).sum()
        case "units":
            return (left * right).sum(axis=1)
        case "matrix" if blocks == 1:
            product = left @ right.T
            return (product + product.T) / 2
        case "matrix":
            left, right = (
                a.reshape(blocks, a.shape[0] // blocks, -1) for a in (left, right)
            )
            product = left @ right.swapaxes(1, 2)
            return (product + product.swapaxes(1, 2)) / 2


def _linear(kind: Contraction, term: Term, tree: PyTree) -> Any:
    if kind == "matrix":
        raise ValueError("A matrix law has no linear part.")
    if term.index is None:
        return _sum_units(kind, term, leaf_at(tree, term.path))
    rows = term.rows(tree)
    return rows.sum() if kind == "total" else rows.sum(axis=1)


def _sum_units(kind: Contraction, term: Term, array) -> Any:
    """All of a term's array, or each of its units, summed where it lies.

    XLA takes up to ten times as long on CPUs for the sums of rows of a transposed array.
    """
    if kind == "total":
        return array.sum()
    array = array if term.view is None else array.reshape(term.view)
    if array.ndim == 0:
        return array.reshape(1)
    return array.sum(axis=tuple(a for a in range(array.ndim) if a != term.axis))


_LATEX = {"²": "^2", "ᵀ": r"^\top", "Σ": r"\sum", "−": "-", "·": r"\cdot "}


def _to_latex(formula: str) -> str:
    """A formula in the paper's letters, as TeX."""
    text = re.sub(r"([A-Za-z])(\d+)", r"\1_{\2}", formula)
    text = re.sub(r"‖([^‖]*)‖", r"\\lVert \1\\rVert ", text)
    for plain, tex in _LATEX.items():
        text = text.replace(plain, tex)
    return text.replace(" ^", "^")
