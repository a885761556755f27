"""Flows to their end: stationary points, and what they are."""

from ._nearby import stationary_point_near as stationary_point_near
from ._plateaus import find_saddles as find_saddles, why_no_saddles as why_no_saddles
from ._search import (
    Outcome as Outcome,
    numbers_of as numbers_of,
    solve_to_stationary_point as solve_to_stationary_point,
)
from ._segments import Segment as Segment
