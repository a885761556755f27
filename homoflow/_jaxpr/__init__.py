"""Interpreters that read a traced function: smoothness, affinity, kinks, softplus."""

from ._affine import Degree as Degree, degree_in as degree_in
from ._dependence import outputs_without_inputs as outputs_without_inputs
from ._fast_softplus import (
    has_softplus as has_softplus,
    use_fast_softplus as use_fast_softplus,
)
from ._interpreter import inner_jaxprs as inner_jaxprs, interpret as interpret
from ._kink_tape import Operation as Operation
from ._kink_transform import (
    PiecewiseSmoothFunction as PiecewiseSmoothFunction,
    expose_kinks as expose_kinks,
)
from ._loops import scan_counts as scan_counts
from ._smoothness import nonsmooth_primitives as nonsmooth_primitives
