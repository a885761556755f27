"""The units of one kinked operation of a model, and what to call them."""

from typing import NamedTuple


class KinkLayer(NamedTuple):
    """The units of one kinked operation of a model.

    - `name`: of the operation, such as relu.
    - `number`: of the hidden layer in homoflow's own networks, from 1; of the operation
        in order of evaluation in other models.
    - `label`: what to call it: "layer 1", "relu 2".
    - `shape`: of its units, such as (channels, rows, columns).
    """

    name: str
    number: int
    label: str
    shape: tuple[int, ...]
