"""Layered networks: fully connected, convolutional, and with shared weights.

All are pure functions of one sample; `jax.vmap` makes them functions of a batch.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._jax._arguments import check_flag, check_key
from .._jax._text import first_line
from ._activations import AbstractActivation, ActivationLike, per_layer
from ._initializers import AbstractInitializer, Kaiming, WeightSpec, check_init
from ._shared import SharedLinear

#: An initializer, or a function that is called in the same way.
Initializer = AbstractInitializer | Callable[..., Any]


class AbstractNetwork(eqx.Module):
    """f_w(x) = W_N φ_{N−1}(W_{N−1} ⋯ φ_1(W_1 x)), layers of any linear kind.

    Whatever is written against `layers` and `activations` (forward pass, laws) serves
    every network of the library.
    """

    layers: eqx.AbstractVar[tuple[Any, ...]]
    activations: eqx.AbstractVar[tuple[AbstractActivation, ...]]

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " out"]:
        """The prediction for one sample `x`."""
        for layer, activation in zip(self.layers[:-1], self.activations, strict=True):
            x = activation(_apply(layer, x))
        return _apply(self.layers[-1], x)


class MLP(AbstractNetwork):
    """A fully connected network [Du, Hu & Lee 2018, §2.1].

    **Arguments:**

    - `sizes`: widths n_0, n_1, …, n_N: input, hidden layers, output.
    - `activation`: `"relu"` (default), `"linear"`, `"leaky_relu"`, `"abs"`, an
        activation object such as `homoflow.LeakyReLU(0.1)` or `homoflow.Power(2)`, or a
        function of an array; or a sequence with one for each hidden layer.
    - `use_bias`: trainable biases in every layer, zero at first (none by default).
    - `init`: an initializer (default `homoflow.Kaiming()`: N(0, 2 / fan_in)), or a function
        of the same arguments.
    - `key`: a JAX random key.
    - `dtype`: of the weights (JAX's default floating-point type).

    Maps one sample of shape `(n_0,)` to a prediction of shape `(n_N,)`.

    **Raises:** `ValueError` for fewer than two sizes, a size below 1, or activations or
    spreads that do not match the number of layers.

    ```python
    model = hf.MLP((20, 30, 30, 3), activation="relu", key=jax.random.key(0))
    prediction = model(jnp.ones(20))  # shape (3,)
    ```
    """

    layers: tuple[eqx.nn.Linear, ...]
    activations: tuple[AbstractActivation, ...]

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: ActivationLike | Sequence[ActivationLike] = "relu",
        use_bias: bool = False,
        init: Initializer | None = None,
        key: PRNGKeyArray,
        dtype=None,
    ):
        check_flag("use_bias", use_bias)
        sizes = _checked_sizes(sizes, at_least=2)
        self.activations = per_layer(activation, len(sizes) - 2)
        layers = _dense_chain(sizes, use_bias, dtype)
        specs = _specs(layers, self.activations, units=sizes[:-1])
        self.layers = _initialized(layers, specs, init, key)


class ConvNet(AbstractNetwork):
    """Convolutions, 1-d or 2-d, that end in one or more dense layers.

    **Arguments:**

    - `in_shape`: of one sample, `(channels, length)` or `(channels, height, width)`.
    - `channels`: output channels of each convolution.
    - `out_size`: size of the prediction.
    - `hidden`: widths of dense hidden layers between the convolutions and the output.
    - `kernel_size`, `stride`, `padding`: an integer for all convolutions, or a sequence
        with one for each. Padding is with zeros, on both sides of each axis.
    - `activation`, `use_bias`, `init`, `key`, `dtype`: as for `homoflow.MLP`; one
        activation for each convolution and each dense hidden layer.

    Maps one sample of shape `in_shape` to a prediction of shape `(out_size,)`.

    **Raises:** `ValueError` if the shapes do not fit together.

    ```python
    model = hf.ConvNet((1, 8, 8), (4, 8), 10, padding=1, key=jax.random.key(0))
    ```
    """

    layers: tuple[eqx.nn.Conv | eqx.nn.Linear, ...]
    activations: tuple[AbstractActivation, ...]

    def __init__(
        self,
        in_shape: Sequence[int],
        channels: Sequence[int],
        out_size: int,
        *,
        hidden: Sequence[int] = (),
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        activation: ActivationLike | Sequence[ActivationLike] = "relu",
        use_bias: bool = False,
        init: Initializer | None = None,
        key: PRNGKeyArray,
        dtype=None,
    ):
        check_flag("use_bias", use_bias)
        n_in, *image = _checked_sizes(in_shape, at_least=2)
        channels = _checked_sizes(channels, at_least=1)
        if len(image) > 2:
            raise ValueError(
                "`in_shape` is (channels, length) or (channels, height, width); got "
                f"{in_shape}."
            )
        dims = len(image)
        units = [n_in, *channels, *hidden]
        kernels = _per_convolution("kernel_size", kernel_size, len(channels), least=1)
        strides = _per_convolution("stride", stride, len(channels), least=1)
        paddings = _per_convolution("padding", padding, len(channels), least=0)
        layers: list[eqx.nn.Conv | eqx.nn.Linear] = []
        for n_out, kernel, step, pad in zip(
            channels, kernels, strides, paddings, strict=True
        ):
            layers.append(
                _unfilled(
                    eqx.nn.Conv, dims, n_in, n_out, kernel, step, pad,
                    use_bias=use_bias, dtype=dtype,
                )
            )  # fmt: skip
            n_in, image = (
                n_out,
                tuple((n + 2 * pad - kernel) // step + 1 for n in image),
            )
            if min(image) < 1:
                raise ValueError(
                    f"Convolution {len(layers)} leaves nothing of the image (its output "
                    f"would have shape {(n_out, *image)}): use a smaller kernel or "
                    "stride, or more padding."
                )
        dense_sizes = _checked_sizes((*hidden, out_size), at_least=1)
        layers += _dense_chain((math.prod(image) * n_in, *dense_sizes), use_bias, dtype)
        self.activations = per_layer(activation, len(layers) - 1)
        specs = _specs(layers, self.activations, units=units)
        self.layers = _initialized(layers, specs, init, key)


class SharedMLP(AbstractNetwork):
    """A network of layers with any sparsity and weight sharing [Du et al. 2018, §2.2].

    **Arguments:**

    - `maps`: one integer array g_h of shape `(n_h, n_{h−1})` for each layer, with
        W_h[i, j] = v_h[g_h(i, j) − 1], or 0 where g_h(i, j) = 0.
    - `activation`, `use_bias`, `init`, `key`, `dtype`: as for `homoflow.MLP`. The
        initializer draws the free weights v_h; `fan_in` is the mean number of
        connections of an output.

    Maps one sample of shape `(n_0,)` to a prediction of shape `(n_N,)`.

    **Raises:** `ValueError` if a map is malformed or two do not fit together.

    ```python
    toeplitz = [[2, 1, 0], [0, 2, 1]]  # a convolution with a filter of two weights
    model = hf.SharedMLP([toeplitz, [[1, 2]]], key=jax.random.key(0))
    ```
    """

    layers: tuple[SharedLinear, ...]
    activations: tuple[AbstractActivation, ...]

    def __init__(
        self,
        maps: Sequence[Any],
        *,
        activation: ActivationLike | Sequence[ActivationLike] = "relu",
        use_bias: bool = False,
        init: Initializer | None = None,
        key: PRNGKeyArray,
        dtype=None,
    ):
        check_flag("use_bias", use_bias)
        layers = [SharedLinear(g, use_bias=use_bias, dtype=dtype) for g in maps]
        if not layers:
            raise ValueError("`maps` is empty: give one map for each layer.")
        for h, (below, above) in enumerate(itertools.pairwise(layers), 1):
            if above.index.shape[1] != below.index.shape[0]:
                raise ValueError(
                    f"Map {h} has {below.index.shape[0]} outputs and map {h + 1} has "
                    f"{above.index.shape[1]} inputs."
                )
        self.activations = per_layer(activation, len(layers) - 1)
        specs = _specs(layers, self.activations, units=(None,) * len(layers))
        self.layers = _initialized(layers, specs, init, key)


def _apply(layer, x: Array) -> Array:
    if isinstance(layer, eqx.nn.Linear) and x.ndim > 1:
        x = x.reshape(-1)
    return layer(x)


def _checked_sizes(sizes: Sequence[int], *, at_least: int) -> tuple[int, ...]:
    sizes = tuple(sizes) if isinstance(sizes, Iterable) else (sizes,)
    if len(sizes) < at_least or any(not _is_count(n) or n < 1 for n in sizes):
        raise ValueError(
            f"Sizes must be at least {at_least} positive integers; got {sizes}."
        )
    return tuple(int(n) for n in sizes)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _per_convolution(
    name: str, value: int | Sequence[int], count: int, *, least: int
) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value] * count
    if len(values) != count:
        raise ValueError(
            f"`{name}` has {len(values)} entries for {count} convolutions."
        )
    if any(not _is_count(n) or n < least for n in values):
        raise ValueError(f"`{name}` takes integers of at least {least}; got {value}.")
    return values


def _dense_chain(sizes: Sequence[int], use_bias: bool, dtype) -> list[eqx.nn.Linear]:
    return [
        _unfilled(eqx.nn.Linear, n_in, n_out, use_bias=use_bias, dtype=dtype)
        for n_in, n_out in itertools.pairwise(sizes)
    ]


def _unfilled(layer: Callable, *args, **keywords):
    """A layer with shapes in place of arrays: `_initialized` draws them."""
    return eqx.filter_eval_shape(lambda: layer(*args, **keywords, key=jr.key(0)))


def _specs(
    layers: Sequence[Any],
    activations: Sequence[AbstractActivation],
    units: Sequence[int | None],
) -> list[WeightSpec]:
    degrees = [1, *(a.degree or 1 for a in activations)]
    return [
        _spec(layer, n, degree)
        for layer, n, degree in zip(layers, units, degrees, strict=True)
    ]


def _spec(layer, in_units: int | None, degree: int) -> WeightSpec:
    if isinstance(layer, SharedLinear):
        connections = int(np.count_nonzero(layer.index))
        n_out, n_in = layer.index.shape
        fans = max(1, connections // n_out), max(1, connections // n_in)
        return WeightSpec(layer.v.shape, *fans, None, None, degree)
    shape = layer.weight.shape
    field = math.prod(shape[2:])
    return WeightSpec(
        shape, shape[1] * field, shape[0] * field, in_units, shape[0], degree
    )


def _initialized(
    layers: Sequence[Any],
    specs: Sequence[WeightSpec],
    init: Initializer | None,
    key: PRNGKeyArray,
) -> tuple[Any, ...]:
    first = layers[0]
    dtype = (first.v if isinstance(first, SharedLinear) else first.weight).dtype
    check_key(key)
    weights = _draw(Kaiming() if init is None else init, key, specs, dtype)
    return tuple(
        _with_weight(layer, weight)
        for layer, weight in zip(layers, weights, strict=True)
    )


def _draw(
    init: Any, key: PRNGKeyArray, specs: Sequence[WeightSpec], dtype
) -> list[Array]:
    """All weights, by an initializer that may be a user's own function."""
    if isinstance(init, AbstractInitializer):
        weights = init(key, specs, dtype)
    else:
        weights = _draw_by_function(init, key, specs, dtype)
    returned = [tuple(jnp.shape(weight)) for weight in weights]
    wanted = [tuple(spec.shape) for spec in specs]
    if returned != wanted:
        raise ValueError(
            f"`init` must return one array for each layer, of shapes {wanted}; it returned "
            f"{returned}."
        )
    return weights


def _draw_by_function(
    init: Any, key: PRNGKeyArray, specs: Sequence[WeightSpec], dtype
) -> list[Array]:
    check_init(init)
    try:
        return list(init(key, specs, dtype))
    except Exception as error:  # whatever a user's function raises
        raise TypeError(
            "`init` is called once for the whole network, as `init(key, specs, dtype)`, "
            "with a `homoflow.WeightSpec` for each layer (`spec.shape`, `spec.fan_in`, …), "
            f"and returns a list of one array for each: {first_line(error)}."
        ) from error


def _with_weight(layer, weight: Array):
    """The layer with this weight, and its bias at zero."""
    if isinstance(layer, SharedLinear):
        return eqx.tree_at(lambda m: m.v, layer, weight)
    layer = eqx.tree_at(lambda m: m.weight, layer, weight)
    if layer.bias is not None:
        zeros = jnp.zeros(layer.bias.shape, layer.bias.dtype)
        layer = eqx.tree_at(lambda m: m.bias, layer, zeros)
    return layer
