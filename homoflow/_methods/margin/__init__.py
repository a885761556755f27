"""Directions of maximal margin: their conditions, and late flows that tend to them."""

from ._certificate import (
    certificate_at as certificate_at,
    why_no_certificate as why_no_certificate,
)
from ._polish import polish as polish
