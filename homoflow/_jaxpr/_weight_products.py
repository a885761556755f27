"""Weights whose gradients are outer products, or sums of them over positions."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ._traced_value import TracedValue


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """A weight that enters only once, as the matrix of a matrix-vector product.

    Its gradient is then the outer product of the vector and of the gradient with respect
    to the result.

    - `leaf`: its place among the leaves of the weights.
    - `shape`: of the result.
    - `is_transposed`: whether the result is xᵀW rather than Wx.
    """

    leaf: int
    shape: tuple[int, ...]
    is_transposed: bool


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A weight that enters only once, as the kernel of a convolution.

    Its gradient is then a sum of outer products over positions: of the patch of the image
    that the kernel lies on, and of the gradient with respect to the result there. Automatic
    differentiation would compute a convolution with another kernel for each gradient, for
    which XLA has no fast code on CPUs.

    - `leaf`: its place among the leaves of the weights; `kernel`: its shape, outputs and
        inputs first.
    - `shape`: of the result.
    - `strides`, `padding`, `dilation`, `kernel_dilation`, `groups`, `numbers`: see
        `jax.lax.conv_general_dilated`.
    """

    leaf: int
    kernel: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    numbers: lax.ConvDimensionNumbers

    @property
    def patch_size(self) -> int:
        """How many numbers there are in all patches of an image."""
        return self._positions * self.groups * math.prod(self.kernel[1:])

    def patches(self, image: Array) -> Float[Array, "positions groups inputs"]:
        """What the kernel lies on, for each entry of the result's batch and space."""
        x = jnp.transpose(image, self.numbers.lhs_spec)
        edges = zip(self.padding, self.dilation, strict=True)
        edges = [(0, 0, 0)] * 2 + [(low, high, d - 1) for (low, high), d in edges]
        x = lax.pad(x, jnp.zeros((), x.dtype), edges)
        # One axis of space after another becomes two: positions, and offsets from them.
        for i, size in enumerate(self._space):
            along = np.arange(size)[:, None] * self.strides[i]
            offsets = np.arange(self.kernel[2 + i]) * self.kernel_dilation[i]
            x = jnp.take(x, along + offsets, axis=2 + 2 * i, mode="clip")
        axes = range(2, x.ndim)
        x = jnp.transpose(x, (0, *axes[::2], 1, *axes[1::2]))
        return x.reshape(self._positions, self.groups, math.prod(self.kernel[1:]))

    def by_position(self, result: Array) -> Float[Array, "positions groups outputs"]:
        """An array of the result's shape, in the order of `patches`."""
        batch, outputs, *space = self.numbers.out_spec
        out = jnp.transpose(result, (batch, *space, outputs))
        return out.reshape(self._positions, self.groups, -1)

    def gradient(
        self,
        delta: Float[Array, "positions groups outputs"],
        patches: Float[Array, "positions groups inputs"],
    ) -> Array:
        """With respect to the kernel, from that with respect to the result.

        Positions of many images together give the sum of their gradients.
        """
        summed = jnp.einsum("pgo,pgi->goi", delta, patches).reshape(self.kernel)
        spec = self.numbers.rhs_spec
        return jnp.transpose(summed, [spec.index(axis) for axis in range(len(spec))])

    @property
    def _space(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.numbers.out_spec[2:])

    @property
    def _positions(self) -> int:
        return self.shape[self.numbers.out_spec[0]] * math.prod(self._space)


def find_weight_product(
    eqn, operands: list[TracedValue]
) -> MatrixProduct | Convolution | None:
    """The product or the convolution with a weight that an equation is, if it is one."""
    match eqn.primitive.name:
        case "dot_general":
            return _find_matrix_product(eqn, operands)
        case "conv_general_dilated":
            return _find_convolution(eqn, operands[1])
    return None


def _find_matrix_product(eqn, operands: list[TracedValue]) -> MatrixProduct | None:
    contracted, (left_batch, _) = eqn.params["dimension_numbers"]
    for matrix, vector, axes in zip(operands, operands[::-1], contracted, strict=True):
        is_matrix = matrix.leaf is not None and matrix.array.ndim == 2
        if is_matrix and vector.array.ndim == 1 and len(axes) == 1 and not left_batch:
            assert matrix.leaf is not None
            shape = (matrix.array.shape[1 - axes[0]],)
            return MatrixProduct(matrix.leaf, shape, is_transposed=axes[0] == 0)
    return None


def _find_convolution(eqn, kernel: TracedValue) -> Convolution | None:
    given = eqn.params
    if kernel.leaf is None or given["batch_group_count"] != 1:
        return None
    numbers = given["dimension_numbers"]
    return Convolution(
        leaf=kernel.leaf,
        kernel=tuple(kernel.array.shape[axis] for axis in numbers.rhs_spec),
        shape=tuple(eqn.outvars[0].aval.shape),
        strides=tuple(given["window_strides"]),
        padding=tuple(given["padding"]),
        dilation=tuple(given["lhs_dilation"]),
        kernel_dilation=tuple(given["rhs_dilation"]),
        groups=given["feature_group_count"],
        numbers=numbers,
    )
