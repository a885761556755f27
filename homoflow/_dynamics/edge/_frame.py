"""Eigenvectors at the threshold, and how the Hessian between them changes with weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._symmetric import as_matrix, as_vector, pairs


class Slopes(NamedTuple):
    """J, which takes a direction to the change of UᵀHU along it, as `as_vector` has it.

    - `rows`: of J; zero beyond the pairs of eigenvectors at the threshold.
    - `gram`: JJ*.
    - `rates`, `elapsed`: J is `rows + elapsed·rates`, if it is known so.
    """

    rows: Float[Array, "pairs size"]
    gram: Float[Array, "pairs pairs"]
    rates: Float[Array, "pairs size"] | None = None
    elapsed: Float[Array, ""] | None = None

    @staticmethod
    def from_rows(rows: Float[Array, "pairs size"]) -> "Slopes":
        return Slopes(rows, rows @ rows.T)

    def along(self, direction: Float[Array, " size"]) -> Float[Array, " pairs"]:
        """J·v."""
        change = self.rows @ direction
        if self.rates is not None and self.elapsed is not None:
            change += self.elapsed * (self.rates @ direction)
        return change

    def force(self, x: Float[Array, " pairs"]) -> Float[Array, " size"]:
        """J*x, which is ∇⟨X, UᵀHU⟩."""
        force = x @ self.rows
        if self.rates is not None and self.elapsed is not None:
            force += self.elapsed * (x @ self.rates)
        return force


class Frame(NamedTuple):
    """Eigenvectors U at the threshold, as rows, and J, zero beyond them."""

    vectors: Float[Array, "critical size"]
    slopes: Float[Array, "pairs size"]

    def turned_to(self, other: "Frame", num: Int[Array, ""]) -> "Frame":
        """The frame RU of the same space that is closest to another one.

        Eigenvectors of equal eigenvalues are any basis of their space: from one point to
        the next they change only after this.
        """
        size = self.vectors.shape[0]
        is_used = jnp.arange(size) < num
        overlap = other.vectors @ self.vectors.T
        identity = jnp.eye(size, dtype=overlap.dtype)
        left, _, right = jnp.linalg.svd(
            jnp.where(is_used[:, None] & is_used, overlap, identity)
        )
        rotation = left @ right

        def turn(x: Array) -> Array:
            return as_vector(rotation @ as_matrix(x, size) @ rotation.T)

        of_pairs = jax.vmap(turn)(jnp.eye(len(pairs(size)[0]), dtype=overlap.dtype))
        return Frame(rotation @ self.vectors, of_pairs.T @ self.slopes)


class Course(NamedTuple):
    """Where a frame goes, linear in the time since it was there.

    - `products`: of J's rows with each other, those with its rates (both ways), and those
        of its rates, from which JJ* is had at every time.
    """

    now: Frame
    rates: Frame
    products: tuple[Array, Array, Array]

    @staticmethod
    def through(
        before: Frame, now: Frame, elapsed: Float[Array, ""], num: Int[Array, ""]
    ) -> "Course":
        """Through two frames, `elapsed` apart; if that is 0 the frame stands still."""
        rate = jnp.where(elapsed > 0, 1 / jnp.where(elapsed > 0, elapsed, 1), 0)
        is_vector = (jnp.arange(now.vectors.shape[0]) < num)[:, None]
        before = before.turned_to(now, num)
        vectors = jnp.where(is_vector, rate * (now.vectors - before.vectors), 0)
        slopes = rate * (now.slopes - before.slopes)
        mixed = now.slopes @ slopes.T
        products = now.slopes @ now.slopes.T, mixed + mixed.T, slopes @ slopes.T
        return Course(now, Frame(vectors, slopes), products)

    def vectors(self, elapsed: Float[Array, ""]) -> Float[Array, "critical size"]:
        return self.now.vectors + elapsed * self.rates.vectors

    def slopes(self, elapsed: Float[Array, ""]) -> Slopes:
        constant, linear, quadratic = self.products
        gram = constant + elapsed * (linear + elapsed * quadratic)
        return Slopes(self.now.slopes, gram, self.rates.slopes, elapsed)
