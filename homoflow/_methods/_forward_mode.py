"""What is said where forward mode cannot go through a solve."""

import contextlib
from collections.abc import Iterator

import diffrax as dfx

_NO_FORWARD_MODE = (
    "Forward-mode derivatives (jax.jvp, jax.jacfwd) through a flow of Diffrax's take "
    "`adjoint=diffrax.ForwardMode()`: its default adjoint, which stores checkpoints, gives "
    "reverse-mode ones only (jax.grad). A `jax.custom_vjp` in the model rules them out."
)


@contextlib.contextmanager
def named_forward_mode(adjoint: dfx.AbstractAdjoint) -> Iterator[None]:
    """Say how forward mode is had, where Diffrax's checkpoints only go backwards."""
    try:
        yield
    except TypeError as error:
        is_checkpointed = isinstance(adjoint, dfx.RecursiveCheckpointAdjoint)
        if not (is_checkpointed and "custom_vjp" in str(error)):
            raise
        raise TypeError(_NO_FORWARD_MODE) from error
