"""Progress meters for long runs, Diffrax's own."""

import importlib.util

import diffrax as dfx

Progress = bool | dfx.AbstractProgressMeter


def as_meter(progress: Progress) -> dfx.AbstractProgressMeter:
    """The meter asked for: none, a bar (lines of text without tqdm), or the given one."""
    if isinstance(progress, dfx.AbstractProgressMeter):
        return progress
    if not progress:
        return dfx.NoProgressMeter()
    if importlib.util.find_spec("tqdm") is None:
        return dfx.TextProgressMeter()
    return dfx.TqdmProgressMeter()
