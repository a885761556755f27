"""How an experiment shows its progress: as `homoflow.flow` does."""

import diffrax as dfx

Progress = bool | dfx.AbstractProgressMeter
