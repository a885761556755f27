"""Weights whose gradients are outer products, or sums of them over positions."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ._values import Value


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight that enters only once, as the matrix of a matrix-vector product.

    Then its share of a gradient is an outer product of the vector and of the gradient
    with respect to the result.

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

    Then its share of a gradient is a sum over positions of outer products, of the patch
    of the image that the kernel lies on and of the gradient with respect to the result.
    Autodiff would make it a convolution with a kernel for each gradient, for which XLA has
    no fast code on CPUs.

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
        edges = [(a, b, d - 1) for (a, b), d in zip(self.padding, self.dilation)]  # noqa: B905
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 2 + edges)
        # One axis of space after another becomes two: positions, and offsets from them.
        for i, size in enumerate(self._space):
            along = np.arange(size)[:, None] * self.strides[i]
            offsets = np.arange(self.kernel[2 + i]) * self.kernel_dilation[i]
            x = jnp.take(x, along + offsets, axis=2 + 2 * i, mode="clip")
        batch, channels = x.shape[:2]
        x = x.reshape(batch, self.groups, channels // self.groups, *x.shape[2:])
        rank = len(self._space)
        positions, offsets = (
            tuple(range(start, start + 2 * rank, 2)) for start in (3, 4)
        )
        x = jnp.transpose(x, (0, *positions, 1, 2, *offsets))
        return x.reshape(self._positions, self.groups, math.prod(self.kernel[1:]))

    def by_position(self, result: Array) -> Float[Array, "positions groups outputs"]:
        """An array of the result's shape, in the order of `patches`."""
        out = jnp.transpose(result, self.numbers.out_spec)
        out = jnp.moveaxis(out, 1, -1)
        return out.reshape(self._positions, self.groups, -1)

    def gradient(
        self,
        delta: Float[Array, "positions groups outputs"],
        patches: Float[Array, "positions groups inputs"],
    ) -> Array:
        """With respect to the kernel, from that with respect to the result.

        Positions of many images together give the sum of their gradients.
        """
        summed = jnp.einsum("pgo,pgi->goi", delta, patches)
        back = np.argsort(self.numbers.rhs_spec)
        return jnp.transpose(summed.reshape(self.kernel), back)

    @property
    def _space(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.numbers.out_spec[2:])

    @property
    def _positions(self) -> int:
        return self.shape[self.numbers.out_spec[0]] * math.prod(self._space)


def product_of(eqn, operands: list[Value]) -> Product | Convolution | None:
    """The product or the convolution with a weight that an equation is, if it is one."""
    match eqn.primitive.name:
        case "dot_general":
            return _product_of(eqn, operands)
        case "conv_general_dilated":
            return _convolution_of(eqn, operands[1])
    return None


def _product_of(eqn, operands: list[Value]) -> Product | None:
    contracted, (left_batch, _) = eqn.params["dimension_numbers"]
    for matrix, vector, axes in zip(operands, operands[::-1], contracted, strict=True):
        is_matrix = matrix.leaf is not None and matrix.array.ndim == 2
        if is_matrix and vector.array.ndim == 1 and len(axes) == 1 and not left_batch:
            assert matrix.leaf is not None
            shape = (matrix.array.shape[1 - axes[0]],)
            return Product(matrix.leaf, shape, is_transposed=axes[0] == 0)
    return None


def _convolution_of(eqn, kernel: Value) -> Convolution | None:
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
