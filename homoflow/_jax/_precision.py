"""Matrix products in the precision of their dtype."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def full_matmul_precision() -> Iterator[None]:
    """Keep accelerators from rounding the factors of float32 matrix products.

    GPUs would use 10 bits of mantissa and TPUs 7, far too few for a tolerance of 1e-5 or
    for a law to balance. A precision that the user has set in JAX's configuration stays.
    """
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is not None:
        yield
        return
    with jax.default_matmul_precision("highest"):
        yield
