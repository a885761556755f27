"""The refusal of batches and of traced runs by what works on one run in Python."""

from .._jax._tracing import is_concrete
from ._trajectory import Trajectory


def check_single_run(function: str, run: Trajectory) -> None:
    """`ValueError` unless it is one run, with known values; `function` asks for it."""
    if not is_concrete(run) or run.ts.ndim != 1:
        raise ValueError(
            f"`homoflow.{function}` takes one run, outside of jit and vmap: index a batch "
            "first, `jax.tree.map(lambda a: a[i], run)`."
        )
