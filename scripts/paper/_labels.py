"""The paper's symbols as matplotlib sets them, and axes of ratios."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis

NORM, NEXT_NORM = "‖W$_h$‖²", "‖W$_{h+1}$‖²"
DIFFERENCE = f"{NORM} − {NEXT_NORM}"
RATIO = f"{NORM} / {NEXT_NORM}"
#: Of matrix factorization.
IMBALANCE = "‖UᵀU − VᵀV‖$_F$"
DISTANCE = "‖UVᵀ − M*‖$_F$"


def plain_ticks(axis: "Axis") -> None:
    """Ticks such as 0.5, 1, 2 on a logarithmic axis that spans a factor of 100 or less."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
