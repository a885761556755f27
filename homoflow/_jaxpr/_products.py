"""Weights that enter as the matrix of a matrix-vector product."""

import dataclasses

from ._values import Value


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight that enters only once, as the matrix of a matrix-vector product.

    Then its share of a gradient is an outer product of the vector and of the gradient
    with respect to the result.

    - `leaf`: its place among the leaves of the weights.
    - `size`: of the result.
    - `is_transposed`: whether the result is xᵀW rather than Wx.
    """

    leaf: int
    size: int
    is_transposed: bool


def product_of(eqn, operands: list[Value]) -> Product | None:
    """The matrix-vector product of a weight that an equation is, if it is one."""
    if eqn.primitive.name != "dot_general":
        return None
    contracted, (left_batch, _) = eqn.params["dimension_numbers"]
    for matrix, vector, axes in zip(operands, operands[::-1], contracted, strict=True):
        is_matrix = matrix.leaf is not None and matrix.array.ndim == 2
        if is_matrix and vector.array.ndim == 1 and len(axes) == 1 and not left_batch:
            assert matrix.leaf is not None
            size = matrix.array.shape[1 - axes[0]]
            return Product(matrix.leaf, size, is_transposed=axes[0] == 0)
    return None
