"""Directions of maximal margin: their conditions, and late flows that tend to them."""

from ._certificate import (
    certificate_at as certificate_at,
    why_no_certificate as why_no_certificate,
)
from ._extend import with_limit_direction as with_limit_direction
from ._limit_direction import (
    CREEPS_FROM as CREEPS_FROM,
    SMOOTH_STAGES as SMOOTH_STAGES,
    LogClock as LogClock,
    follow_to_limit_direction as follow_to_limit_direction,
    log_loss_at as log_loss_at,
    why_no_limit as why_no_limit,
)
from ._on_kinks import (
    follow_kinks_to_limit_direction as follow_kinks_to_limit_direction,
)
from ._polish import polish as polish
