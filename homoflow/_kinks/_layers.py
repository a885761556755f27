"""What to call the units of a model's kinked operations."""

from typing import Any

import jax.numpy as jnp

from .._jaxpr import Operation, expose_kinks
from .._models import AbstractNetwork
from .._results._kink_layer import KinkLayer


def kink_layers(model: Any, operations: tuple[Operation, ...]) -> tuple[KinkLayer, ...]:
    """Numbers and labels for the kinked operations of a model.

    Those of homoflow's own networks belong to hidden layers. What another model means
    by a layer is not known: there, operations are counted in order of evaluation.
    """
    numbers = _hidden_layers(model)
    if len(numbers) == len(operations):
        return tuple(
            KinkLayer(o.name, n, f"layer {n}", o.shape)
            for o, n in zip(operations, numbers, strict=True)
        )
    return tuple(
        KinkLayer(o.name, n, f"{o.name} {n}", o.shape)
        for n, o in enumerate(operations, 1)
    )


def _hidden_layers(model: Any) -> list[int]:
    """The hidden layer of each kinked operation of a homoflow network."""
    if not isinstance(model, AbstractNetwork):
        return []
    z = jnp.zeros(())
    return [
        layer
        for layer, activation in enumerate(model.activations, 1)
        for _ in expose_kinks(lambda z, _, x, a=activation: a(z), z, (), z).operations
    ]
