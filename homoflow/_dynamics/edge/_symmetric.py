"""Symmetric matrices as vectors, with the same inner product."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def pairs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows i and columns j ≥ i of a matrix's upper half, column after column.

    The leading blocks of a matrix are the leading pairs.
    """
    found = [(i, j) for j in range(size) for i in range(j + 1)]
    rows, columns = np.asarray(found).T
    return rows, columns


def num_pairs(size: int | Int[Array, ""]) -> int | Int[Array, ""]:
    """How many pairs a matrix of this size has."""
    return size * (size + 1) // 2


def pair_weights(size: int) -> np.ndarray:
    """What an entry is multiplied by: 1 on the diagonal, √2 beside it."""
    rows, columns = pairs(size)
    return np.where(rows == columns, 1.0, math.sqrt(2))


def as_vector(matrix: Float[Array, "size size"]) -> Float[Array, " pairs"]:
    """The upper half, weighted so that ⟨A, B⟩ is the product of the vectors."""
    size = matrix.shape[0]
    rows, columns = pairs(size)
    return matrix[rows, columns] * jnp.asarray(pair_weights(size), matrix.dtype)


def as_matrix(vector: Float[Array, " pairs"], size: int) -> Float[Array, "size size"]:
    """The symmetric matrix of a vector."""
    rows, columns = pairs(size)
    entries = vector / jnp.asarray(pair_weights(size), vector.dtype)
    empty = jnp.zeros((size, size), vector.dtype)
    return empty.at[rows, columns].set(entries).at[columns, rows].set(entries)


def are_leading(size: int, num: Int[Array, ""]) -> Bool[Array, " pairs"]:
    """Which pairs belong to the leading block of `num` rows."""
    return jnp.asarray(pairs(size)[1]) < num
