"""What a call's answer was found to be."""

import dataclasses
import traceback
from pathlib import Path
from typing import Literal

import homoflow as hf

Outcome = Literal[
    "right", "told", "failed honestly", "false alarm", "not judged", "SILENTLY WRONG",
    "CRASHED",
]  # fmt: skip
#: What is printed, with the call that has it.
FINDINGS = ("SILENTLY WRONG", "CRASHED", "false alarm")


HERE = Path(hf.__file__).parent


@dataclasses.dataclass(frozen=True)
class Judgement:
    """An outcome, with the error that was found beside the one that was promised.

    - `told`: wrong, and a warning, note or result says so.
    - `false alarm`: a refusal or warning of what an oracle computes without trouble.
    - `not judged`: no oracle for this call, or it gave up.
    """

    outcome: Outcome
    error: float = float("nan")
    promised: float = float("nan")
    detail: str = ""


def refused(error: Exception) -> Judgement:
    """What an exception is: a refusal in a sentence of ours, or a crash from inside."""
    text = f"{type(error).__name__}: {error}"
    is_sentence = (
        isinstance(error, ValueError | TypeError | NotImplementedError)
        and len(str(error)) > 40
        and HERE in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parents
    )
    return Judgement("failed honestly" if is_sentence else "CRASHED", detail=text)


class GaveUp(Exception):
    """An oracle needs too many evaluations, or cannot decide."""
