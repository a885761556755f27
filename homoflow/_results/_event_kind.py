"""What happens to a pair of a sample and a unit at an event of the exact flow."""

import enum


class EventKind(enum.IntEnum):
    """What happens to a pair of a sample and a unit at an event.

    - `crossing_up`, `crossing_down`: its pre-activation goes on to the other side of 0.
    - `entry`: it begins to slide, pinned at 0.
    - `exit_up`, `exit_down`: it ceases to slide, and goes on to that side.
    - `choice_up`, `choice_down`: at a concave kink the flow has more than one solution
        to go on with; the one taken keeps the pair on that side (down also if it slides
        among kinks that are not independent, where that has not been looked into).
    """

    crossing_up = 0
    crossing_down = 1
    entry = 2
    exit_up = 3
    exit_down = 4
    choice_up = 5
    choice_down = 6
