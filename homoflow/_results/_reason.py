"""Why something was chosen, for people and for programs."""

import dataclasses
from typing import final


@final
@dataclasses.dataclass(frozen=True)
class Reason:
    """Why something was chosen: `trajectory.stats["solver_reason"]`.

    - `code`: a short name in snake_case, for programs to compare.
    - `text`: the same in words, with the numbers that decided; `str()` gives it.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


REQUESTED = Reason("requested", "asked for")
