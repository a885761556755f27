"""A smaller case with the same verdict."""

from collections.abc import Callable
from typing import Any

from judgement import Judgement


def shrink(
    case: Any, judge: Callable[[Any], Judgement], most: int = 40
) -> tuple[Any, Judgement]:
    """Takes away one thing after another for as long as the outcome stays.

    `most` is how many cases are tried: each may compile programs of its own.
    """
    found = judge(case)
    wanted, tried = found.outcome, {case}
    is_shrinking = True
    while is_shrinking:
        is_shrinking = False
        for simpler in case.simpler():
            if simpler in tried or len(tried) > most:
                continue
            tried.add(simpler)
            judged = _judge(judge, simpler)
            if judged is not None and judged.outcome == wanted:
                case, found, is_shrinking = simpler, judged, True
                break
    return case, found


def _judge(judge: Callable[[Any], Judgement], case: Any) -> Judgement | None:
    """`None` where a simpler case cannot be judged at all, such as no kink to follow."""
    try:
        return judge(case)
    except Exception:
        return None
