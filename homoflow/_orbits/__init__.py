"""The orbits of a model's rescalings: all networks that compute the same function."""

from ._balance import balance as balance
