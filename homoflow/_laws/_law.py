"""What a conservation law is: a quadratic (or linear) function of the weights."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from jaxtyping import Array, Float, PyTree

Contraction = Literal["total", "units", "matrix"]
Path = tuple[Any, ...]


class Term(eqx.Module):
    """One array's share of a law, with its position in the model.

    - `path`: JAX key path from the model to the array.
    - `coefficient`: what the share is multiplied by.
    - `axis`: the axis that counts units (ignored in a total).
    - `view`: shape the array is given first, where units are not an axis of their own.
    """

    path: Path = eqx.field(static=True)
    coefficient: int = eqx.field(static=True)
    axis: int = eqx.field(static=True, default=0)
    view: tuple[int, ...] | None = eqx.field(static=True, default=None)

    def rows(self, model: PyTree) -> Float[Array, "units rest"]:
        """The array as a matrix with one row for each unit."""
        array = leaf_at(model, self.path)
        array = array if self.view is None else array.reshape(self.view)
        return jnp.moveaxis(array, self.axis, 0).reshape(array.shape[self.axis], -1)


class Law(eqx.Module):
    """h(w) = wᵀAw + bᵀw, constant along gradient flow, as the paper prints it (no ½).

    A and b are kept as a few structured terms, never as matrices over all weights. One
    object holds all laws of a kind between two layers: its value is a scalar, a vector
    over units or a symmetric matrix over pairs of units.

    - `name`: short and unique in the model, such as `neurons[1]`.
    - `formula`: what it is, in the paper's letters.
    - `quadratic_terms`, `linear_terms`: A and b.
    """

    name: str = eqx.field(static=True)
    formula: str = eqx.field(static=True)
    contraction: Contraction = eqx.field(static=True)
    quadratic_terms: tuple[Term, ...]
    linear_terms: tuple[Term, ...] = ()

    def value(self, model: PyTree) -> Float[Array, "..."]:
        """wᵀAw + bᵀw of `model`'s weights, in their dtype; under jit and vmap too."""
        return self.bilinear(model, model) + self.linear(model)

    def bilinear(self, left: PyTree, right: PyTree) -> Float[Array, "..."]:
        """uᵀAv of two pytrees of the model's structure, such as weights and gradients.

        With it any step w⁺ = w + u has the exact account
        `value(w⁺) = value(w) + 2·bilinear(w, u) + linear(u) + bilinear(u, u)`.
        """
        shares = (
            t.coefficient * _contract(self.contraction, t.rows(left), t.rows(right))
            for t in self.quadratic_terms
        )
        return sum(shares, start=self._zero(left))

    def quadratic(self, update: PyTree) -> Float[Array, "..."]:
        """q(u) = uᵀAu: one step of gradient descent adds exactly η²q(g)."""
        return self.bilinear(update, update)

    def linear(self, update: PyTree) -> Float[Array, "..."]:
        """bᵀu; 0 for a law that is purely quadratic."""
        shares = (
            t.coefficient * _linear(self.contraction, t.rows(update))
            for t in self.linear_terms
        )
        return sum(shares, start=self._zero(update))

    def paths(self) -> frozenset[Path]:
        """Key paths of the arrays that the law involves."""
        return frozenset(t.path for t in (*self.quadratic_terms, *self.linear_terms))

    def _zero(self, tree: PyTree) -> Float[Array, ""]:
        first = (*self.quadratic_terms, *self.linear_terms)[0]
        return jnp.zeros((), leaf_at(tree, first.path).dtype)

    def __repr__(self) -> str:
        return f"<{self.name}: {self.formula}>"


class Laws(eqx.Module):
    """The conservation laws of a model: an iterable with a length.

    `laws["neurons[1]"]` or `laws[0]` is one of them. `note` says in a sentence why a law
    one might expect is not here; it is empty if there is nothing to say.
    """

    items: tuple[Law, ...]
    note: str = eqx.field(static=True, default="")

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

    def where(self, keep: Iterable[bool], note: str) -> "Laws":
        """Only the laws for which `keep` is true, with a note about the others."""
        items = tuple(law for law, k in zip(self.items, keep, strict=True) if bool(k))
        notes = [self.note] if self.note else []
        if len(items) < len(self.items):
            notes.append(note)
        return Laws(items, " ".join(notes))

    def __repr__(self) -> str:
        lines = [f"  {law.name}: {law.formula}" for law in self.items]
        lines += [f"  ({self.note})"] if self.note else []
        return "\n".join([f"Laws of {len(self)} kinds", *lines])


def leaf_at(tree: PyTree, path: Path) -> Array:
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


def _contract(kind: Contraction, left: Array, right: Array) -> Array:
    match kind:
        case "total":
            return jnp.sum(left * right)
        case "units":
            return jnp.sum(left * right, axis=1)
        case "matrix":
            product = left @ right.T
            return (product + product.T) / 2


def _linear(kind: Contraction, rows: Array) -> Array:
    match kind:
        case "total":
            return jnp.sum(rows)
        case "units":
            return jnp.sum(rows, axis=1)
        case "matrix":
            raise ValueError("A matrix law has no linear part.")
