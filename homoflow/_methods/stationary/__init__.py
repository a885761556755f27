"""Flows to their end: stationary points, and what they are."""

from ._search import flow_to_rest as flow_to_rest
from ._segments import Segment as Segment
