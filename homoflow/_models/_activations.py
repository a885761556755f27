"""Activations that know their degree of homogeneity."""

import abc
from collections.abc import Callable, Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._jax._arguments import check_number, refuse_class
from .._jax._text import short_repr


class AbstractActivation(eqx.Module):
    """A map that acts on each coordinate.

    It is positively homogeneous of degree `k` if φ(cz) = cᵏφ(z) for all c > 0, which
    is the same as φ'(z)·z = k·φ(z) for every element φ'(z) of the sub-differential.
    That identity is what the conservation laws rest on.
    """

    #: k, or `None` if the activation is not positively homogeneous.
    degree: eqx.AbstractVar[int | None]
    #: Whether φ is the identity, which gives the whole matrix law of Theorem 2.2.
    is_identity: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """φ(z), coordinate by coordinate; keeps shape and dtype."""


class Linear(AbstractActivation):
    """φ(z) = z. Degree 1."""

    degree: int | None = eqx.field(static=True, init=False, default=1)
    is_identity: ClassVar[bool] = True

    def __call__(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return z


class ReLU(AbstractActivation):
    """φ(z) = max(z, 0). Degree 1."""

    degree: int | None = eqx.field(static=True, init=False, default=1)

    def __call__(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jax.nn.relu(z)


class LeakyReLU(AbstractActivation):
    """φ(z) = z for z ≥ 0 and `slope`·z below. Degree 1.

    **Arguments:** `slope`, the slope at negative z (0.01 by default).
    """

    slope: float = eqx.field(static=True, default=0.01)
    degree: int | None = eqx.field(static=True, init=False, default=1)

    def __check_init__(self):
        check_number("slope", self.slope)

    def __call__(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jax.nn.leaky_relu(z, self.slope)


class Abs(AbstractActivation):
    """φ(z) = |z|. Degree 1."""

    degree: int | None = eqx.field(static=True, init=False, default=1)

    def __call__(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.abs(z)


class Power(AbstractActivation):
    """φ(z) = zᵏ for an integer k ≥ 1. Degree k.

    **Arguments:** `degree`, the integer k.

    **Raises:** `ValueError` if k < 1.
    """

    degree: int | None = eqx.field(static=True)

    def __init__(self, degree: int):
        self.degree = _checked_power(degree)

    def __call__(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        assert self.degree is not None
        return z**self.degree


class ReLUPower(AbstractActivation):
    """φ(z) = max(z, 0)ᵏ for an integer k ≥ 1. Degree k.

    **Arguments:** `degree`, the integer k.

    **Raises:** `ValueError` if k < 1.
    """

    degree: int | None = eqx.field(static=True)

    def __init__(self, degree: int):
        self.degree = _checked_power(degree)

    def __call__(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        assert self.degree is not None
        return jax.nn.relu(z) ** self.degree


class Elementwise(AbstractActivation):
    """Any function of one coordinate, taken to be *not* homogeneous (tanh, GELU, …).

    A model that uses it has no balance law at that layer.

    **Arguments:** `fn`, a function from an array to an array of the same shape.
    """

    fn: Callable[[Array], Array] = eqx.field(static=True)
    degree: int | None = eqx.field(static=True, init=False, default=None)

    def __call__(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return self.fn(z)


_BY_NAME: dict[str, AbstractActivation] = {
    "linear": Linear(),
    "relu": ReLU(),
    "leaky_relu": LeakyReLU(),
    "abs": Abs(),
}
_BY_FUNCTION: dict[Callable, AbstractActivation] = {
    jax.nn.relu: ReLU(),
    jax.nn.leaky_relu: LeakyReLU(),
    jax.nn.identity: Linear(),
    jnp.abs: Abs(),
}

ActivationLike = str | AbstractActivation | Callable[[Array], Array]


def as_activation(activation: ActivationLike) -> AbstractActivation:
    """An activation from its name, from itself, or from a function of an array.

    Raises `ValueError` for an unknown name.
    """
    if isinstance(activation, AbstractActivation):
        return activation
    if isinstance(activation, str):
        if activation not in _BY_NAME:
            raise ValueError(
                f"Unknown activation {activation!r}: the names are "
                f"{', '.join(sorted(_BY_NAME))}; any function of an array may be passed "
                f"itself, such as `{_function_named(activation)}`."
            )
        return _BY_NAME[activation]
    refuse_class("activation", activation)
    if not callable(activation):
        raise TypeError(
            f"`activation` must be one of the names {', '.join(sorted(_BY_NAME))}, an "
            "activation such as `homoflow.Power(2)`, or a function; got "
            f"{short_repr(activation)}."
        )
    try:
        known = _BY_FUNCTION.get(activation)
    except TypeError as error:
        raise TypeError(
            f"`activation` must be hashable: {type(activation).__name__} is not, perhaps "
            "because it holds arrays. Write an Equinox module of your own for activations "
            "that have parameters."
        ) from error
    return Elementwise(activation) if known is None else known


def _function_named(name: str) -> str:
    """The function of JAX that a name stands for, or an example."""
    for module, where in ((jax.nn, "jax.nn"), (jnp, "jnp")):
        if callable(getattr(module, name, None)):
            return f"{where}.{name}"
    return "jnp.tanh"


def per_layer(
    activation: ActivationLike | Sequence[ActivationLike], hidden_layers: int
) -> tuple[AbstractActivation, ...]:
    """One activation for each hidden layer, from one for all or a sequence of them."""
    if isinstance(activation, str) or not isinstance(activation, Sequence):
        return (as_activation(activation),) * hidden_layers
    if len(activation) != hidden_layers:
        raise ValueError(
            f"{len(activation)} activations for {hidden_layers} hidden layers: give "
            "one for each hidden layer (the output layer has none), or a single one."
        )
    return tuple(as_activation(a) for a in activation)


def _checked_power(degree: int) -> int:
    if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
        raise ValueError(f"The power must be an integer of at least 1, not {degree!r}.")
    return degree
