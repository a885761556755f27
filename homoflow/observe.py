"""Observables: what `observe=` records along a run."""

from ._observe._base import (
    AbstractObservable as AbstractObservable,
    Point as Point,
)
from ._observe._margin import Margin as Margin
from ._observe._ntk import NTK as NTK
from ._observe._outputs import Outputs as Outputs
from ._observe._parameter_norms import ParameterNorms as ParameterNorms
from ._observe._sharpness import Sharpness as Sharpness
from ._observe._singular_values import SingularValues as SingularValues
