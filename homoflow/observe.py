"""Observables: what `observe=` records along a run."""

from ._observe._base import (
    AbstractObservable as AbstractObservable,
    Point as Point,
)
from ._observe._sharpness import Sharpness as Sharpness
