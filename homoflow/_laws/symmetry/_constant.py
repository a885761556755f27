"""Values into which neither parameters nor data enter, computed when they are asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


class Constant:
    """The result of an operation on other constants.

    A value is computed once, however often it is used: a recurrence that uses each of its
    values twice would double the work with every step.
    """

    def __init__(self, operands: "Sequence[Constant]", compute: Callable[..., Any]):
        self._operands = tuple(operands)
        self._compute = compute
        self._results: list[Any] = []

    def value(self) -> Any:
        """The value; operands are computed first, without recursion, however many."""
        waiting = [self]
        with jax.ensure_compile_time_eval():
            while waiting:
                missing = [c for c in waiting[-1]._operands if not c._results]
                if missing:
                    waiting += missing
                    continue
                constant = waiting.pop()
                if not constant._results:
                    values = [c._results[0] for c in constant._operands]
                    constant._results.append(constant._compute(*values))
                    constant._operands = ()
        return self._results[0]
