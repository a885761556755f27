"""The type of a device."""

from typing import Any

#: `jax.Device` is no type to type checkers.
Device = Any
