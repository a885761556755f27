"""A saddle that a flow visits as its start vanishes."""

import equinox as eqx

from ._saddle import Saddle


class SaddleLimit(eqx.Module):
    """A saddle of the limit s → 0, left at the time `date`·log(1/s) + `offset` + o(1).

    - `saddle`: as it was visited from the smallest of the starts.
    - `date`: when it is left, in units of log(1/s); the slope of the times of the two
        smallest starts over log(1/s). `offset`: what these times have beside it.
    - `date_error`, `offset_error`: the difference from what the two largest starts say,
        and what the times' own errors may do to it.
    """

    saddle: Saddle
    date: float
    offset: float
    date_error: float
    offset_error: float

    def __repr__(self) -> str:
        return (
            f"SaddleLimit(left at ({self.date:.6g} ± {self.date_error:.1g})·log(1/s) + "
            f"{self.offset:.6g} ± {self.offset_error:.1g}, loss {self.saddle.loss:.6g})"
        )
