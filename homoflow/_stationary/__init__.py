"""Flows to their end: stationary points, and what they are."""

from ._segments import Segment as Segment
from ._to_rest import flow_to_rest as flow_to_rest
