"""Flows to their end: stationary points, and what they are."""

from ._search import solve_to_stationary_point as solve_to_stationary_point
from ._segments import Segment as Segment
