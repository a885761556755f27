"""Initial weights for a whole network at once.

Balance is a relation *between* layers, so an initializer here sees every layer, not one
array at a time.
"""

import abc
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from .._jax._arguments import (
    as_known_number,
    check_key,
    check_number,
    refuse_class,
)
from .._jax._random import normal
from .._jax._text import short_repr
from .._jax._tracing import is_concrete

#: Known to Python, or traced: by jit, vmap or grad.
Number = float | int | Float[ArrayLike, ""]
#: The initializers there are.
_NAMES = ("Kaiming", "Xavier", "Gaussian", "Orthogonal", "Balanced", "BalancedLinear")


class WeightSpec(NamedTuple):
    """What an initializer needs to know of one layer's trainable weight.

    - `shape`: of the array; its first axis counts the outputs.
    - `fan_in`, `fan_out`: connections into one output and out of one input.
    - `in_units`: how many units of the layer below share this array's second axis
        (channels, for a dense layer on a flattened image), or `None` where weights are
        shared across units and only the total norm is meaningful.
    - `out_units`: the same for the outputs.
    - `degree`: degree of homogeneity of the activation *below* this layer.
    """

    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    in_units: int | None
    out_units: int | None
    degree: int


class AbstractInitializer(eqx.Module):
    """Draws the weights of all layers of a network. Biases start at zero.

    Spreads may be traced: under vmap, one network for each.
    """

    @abc.abstractmethod
    def __call__(
        self, key: PRNGKeyArray, specs: Sequence[WeightSpec], dtype: jnp.dtype
    ) -> list[Float[Array, "..."]]:
        """One array for each of `specs`."""


class Gaussian(AbstractInitializer):
    """Independent N(0, std²) entries, with one `std` or `variance` for each layer.

    **Arguments:** exactly one of

    - `std`: a standard deviation, or a sequence of one for each layer.
    - `variance`: likewise, as a variance. The paper's balanced start of Figure 2 is
        `Gaussian(variance=(1e-4 / 100, 1e-4 / 10, 1e-4))`, its unbalanced one
        `Gaussian(variance=1e-4)` [Du, Hu & Lee 2018, §4].

    **Raises:** `ValueError` if none or both are given, if one is negative, or if their
    number is not the number of layers.
    """

    stds: tuple[Number, ...] | Number

    def __init__(
        self,
        std: Number | Sequence[Number] | Float[ArrayLike, " layers"] | None = None,
        *,
        variance: Number | Sequence[Number] | Float[ArrayLike, " layers"] | None = None,
    ):
        if (std is None) == (variance is None):
            raise ValueError("Give either `std` or `variance`, and not both.")
        name = "std" if variance is None else "variance"
        given: Any = std if variance is None else variance
        is_list = isinstance(given, Sequence) and not isinstance(given, str)
        # Not `tuple(given)` of a single number: an array without axes has no entries.
        values = tuple(given) if is_list or np.ndim(given) == 1 else None
        if values is None:
            self.stds = _checked_std(name, given)
        else:
            self.stds = tuple(_checked_std(name, value) for value in values)

    def __call__(
        self, key: PRNGKeyArray, specs: Sequence[WeightSpec], dtype: jnp.dtype
    ) -> list[Float[Array, "..."]]:
        stds = self.stds if isinstance(self.stds, tuple) else (self.stds,) * len(specs)
        if len(stds) != len(specs):
            raise ValueError(
                f"Gaussian has {len(stds)} spreads for {len(specs)} layers: give one "
                "for each layer, or a single number."
            )
        return _normals(key, specs, stds, dtype)


class Kaiming(AbstractInitializer):
    """N(0, 2 / fan_in) entries: the library's default [He et al. 2015]."""

    def __call__(
        self, key: PRNGKeyArray, specs: Sequence[WeightSpec], dtype: jnp.dtype
    ) -> list[Float[Array, "..."]]:
        return _normals(key, specs, [math.sqrt(2 / s.fan_in) for s in specs], dtype)


class Xavier(AbstractInitializer):
    """N(0, 2 / (fan_in + fan_out)) entries [Glorot & Bengio 2010]."""

    def __call__(
        self, key: PRNGKeyArray, specs: Sequence[WeightSpec], dtype: jnp.dtype
    ) -> list[Float[Array, "..."]]:
        stds = [math.sqrt(2 / (s.fan_in + s.fan_out)) for s in specs]
        return _normals(key, specs, stds, dtype)


class Orthogonal(AbstractInitializer):
    """`scale` times a matrix with orthonormal rows or columns, uniform [Saxe 2014].

    A convolution's weight is orthogonal as a matrix (outputs × everything else).
    """

    scale: Number = 1.0

    def __check_init__(self):
        check_number("scale", self.scale)
        scale: Any = self.scale
        if is_concrete(scale) and not math.isfinite(scale):
            raise ValueError(f"`scale` must be finite; got {scale}.")

    def __call__(
        self, key: PRNGKeyArray, specs: Sequence[WeightSpec], dtype: jnp.dtype
    ) -> list[Float[Array, "..."]]:
        check_key(key)
        init = jax.nn.initializers.orthogonal(column_axis=0)
        scale, keys = jnp.asarray(self.scale, dtype), jr.split(key, len(specs))
        return [
            (scale * init(k, _matrix_shape(s), dtype)).reshape(s.shape)
            for k, s in zip(keys, specs, strict=True)
        ]


class Balanced(AbstractInitializer):
    """N(0, std²) entries rescaled so that every neuron is exactly balanced.

    The first layer is drawn as it is. In each later layer the weights that leave unit i
    are scaled to ‖W_{h+1}[:, i]‖² = ‖W_h[i, :]‖² / k, with k the degree of the
    activation between, so that every law of Theorem 2.1 starts at 0 (to rounding).
    Channels take the place of neurons in convolutions; in layers with weights shared
    across units the total norms are made equal (Theorem 2.3).

    **Raises:** `ValueError` if `std` is not positive and finite.
    """

    std: Number = 0.1

    def __check_init__(self):
        check_spread("std", self.std)
        if is_concrete(self.std) and self.std == 0:
            raise ValueError("`std` must be positive and finite; got 0.")

    def __call__(
        self, key: PRNGKeyArray, specs: Sequence[WeightSpec], dtype: jnp.dtype
    ) -> list[Float[Array, "..."]]:
        weights = _normals(key, specs, (self.std,) * len(specs), dtype)
        for h in range(1, len(weights)):
            weights[h] = _balanced_to(
                weights[h], specs[h], weights[h - 1], specs[h - 1]
            )
        return weights


class BalancedLinear(AbstractInitializer):
    """Layers of a linear network with W_h W_hᵀ = W_{h+1}ᵀ W_{h+1} exactly.

    The end-to-end matrix A has N(0, std²) entries; with its singular value decomposition
    A = UΣVᵀ the layers are W_1 = Σ^{1/N}Vᵀ, W_h = Σ^{1/N}, W_N = UΣ^{1/N}, padded
    with zeros [Arora et al. 2019, Procedure 1].

    **Raises:** `ValueError` if `std` is negative or not finite, a layer is not a dense
    matrix, or if a hidden layer is
    narrower than both ends (the product could not have A's rank).
    """

    std: Number = 0.1

    def __check_init__(self):
        check_spread("std", self.std)

    def __call__(
        self, key: PRNGKeyArray, specs: Sequence[WeightSpec], dtype: jnp.dtype
    ) -> list[Float[Array, "..."]]:
        shapes = [s.shape for s in specs]
        if any(len(shape) != 2 for shape in shapes):
            raise ValueError("BalancedLinear is for networks of dense layers only.")
        (out_size, _), (_, in_size) = shapes[-1], shapes[0]
        rank = min(out_size, in_size)
        if any(shape[0] < rank for shape in shapes[:-1]):
            raise ValueError(
                f"BalancedLinear needs hidden layers of width at least {rank}, the "
                "smaller of the input and output sizes."
            )
        check_key(key)
        product = jnp.asarray(self.std, dtype) * normal(key, (out_size, in_size), dtype)
        left, values, right = jnp.linalg.svd(product, full_matrices=False)
        root = values ** (1 / len(shapes))
        if len(shapes) == 1:
            return [product]
        middle = [_padded(jnp.diag(root), shape) for shape in shapes[1:-1]]
        first = _padded(root[:, None] * right, shapes[0])
        return [first, *middle, _padded(left * root, shapes[-1])]


def check_init(init: Any) -> None:
    """`TypeError` for what is no initializer, nor a function that could be one."""
    refuse_class("init", init)
    if not callable(init):
        names = ", ".join(f"`homoflow.{name}(…)`" for name in _NAMES)
        raise TypeError(
            f"`init` must be an initializer: {names}; got {short_repr(init)}."
        )


def check_spread(name: str, value: Any) -> None:
    """An error unless it is a finite number that is not negative, where it is known."""
    check_number(name, value)
    if is_concrete(value) and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"`{name}` must be finite and not negative; got {value}.")


def _checked_std(name: str, value: Any) -> Number:
    """The standard deviation, from itself or from a variance."""
    check_spread(name, value)
    value = as_known_number(value)
    return value if name == "std" else value**0.5


def _normals(
    key: PRNGKeyArray,
    specs: Sequence[WeightSpec],
    stds: Sequence[Number],
    dtype: jnp.dtype,
) -> list[Array]:
    check_key(key)
    keys = jr.split(key, len(specs))
    return [
        jnp.asarray(std, dtype) * normal(k, spec.shape, dtype)
        for k, spec, std in zip(keys, specs, stds, strict=True)
    ]


def _matrix_shape(spec: WeightSpec) -> tuple[int, int]:
    return spec.shape[0], math.prod(spec.shape[1:])


def _balanced_to(
    weight: Array, spec: WeightSpec, below: Array, below_spec: WeightSpec
) -> Array:
    if spec.in_units is None or below_spec.out_units is None:
        target = jnp.sum(below**2) / spec.degree
        return weight * jnp.sqrt(target / jnp.sum(weight**2))
    target = jnp.sum(below.reshape(below_spec.out_units, -1) ** 2, axis=1) / spec.degree
    columns = weight.reshape(weight.shape[0], spec.in_units, -1)
    norms = jnp.sum(columns**2, axis=(0, 2))
    return (columns * jnp.sqrt(target / norms)[:, None]).reshape(weight.shape)


def _padded(block: Array, shape: tuple[int, ...]) -> Array:
    rows, columns = block.shape
    return jnp.zeros(shape, block.dtype).at[:rows, :columns].set(block)
