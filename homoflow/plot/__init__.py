"""Pictures of trajectories. Needs matplotlib: `pip install homoflow[plot]`.

Functions draw into `ax` (a new figure's by default) and return it. Colours are those of
Okabe & Ito or viridis, which colour-blind readers can tell apart.
"""

from ._axes import COLOURS as COLOURS
from ._curves import (
    law_drift as law_drift,
    losses as losses,
    squared_norms as squared_norms,
)
from ._edge import edge as edge
from ._late import distances as distances, margins as margins
from ._ledger import ledger as ledger
from ._saddles import saddles as saddles
from ._sliding import sliding as sliding, sliding_time as sliding_time
from ._sweeps import bands as bands, heat_map as heat_map, panels as panels
