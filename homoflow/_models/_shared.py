"""A layer with any pattern of missing and shared weights."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class _HashableArray:
    """A constant integer array that can be a static field: compared by its content."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.array.setflags(write=False)
        self._key = (array.shape, array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HashableArray) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"map{self.array.shape}"


class SharedLinear(eqx.Module):
    """A linear layer whose weights may be missing or shared [Du et al. 2018, §2.2].

    W[i, j] = v[g(i, j) − 1] if g(i, j) > 0, and 0 if g(i, j) = 0. A convolution is one
    such g; so is any sparse, block, or Toeplitz layer.

    **Arguments:**

    - `index`: the map g, an integer array of shape `(out, in)` with entries 0…d, each of
        1…d present.
    - `use_bias`: whether to add a trainable bias, one for each output.
    - `dtype`: of the weights (JAX's default floating-point type).

    `v` starts at zero: `SharedMLP` fills it from an initializer.

    **Raises:** `ValueError` if `index` is not such a map.
    """

    v: Float[Array, " d"]
    bias: Float[Array, " out"] | None
    _index: _HashableArray = eqx.field(static=True)

    def __init__(self, index, *, use_bias: bool = False, dtype=None):
        index = np.array(index)
        if index.ndim != 2 or not np.issubdtype(index.dtype, np.integer):
            raise ValueError("`index` must be an integer array of shape (out, in).")
        count = int(index.max(initial=0))
        if index.min(initial=0) < 0 or count == 0:
            raise ValueError("`index` needs entries ≥ 0, at least one of them > 0.")
        absent = sorted(set(range(1, count + 1)) - set(index.ravel().tolist()))
        if absent:
            raise ValueError(
                f"`index` never uses {absent[0]}, though it goes up to {count}: number "
                "the free weights 1…d without gaps."
            )
        dtype = jnp.zeros(()).dtype if dtype is None else dtype
        self.v = jnp.zeros(count, dtype)
        self.bias = jnp.zeros(index.shape[0], dtype) if use_bias else None
        self._index = _HashableArray(index.astype(np.int32))

    @property
    def index(self) -> np.ndarray:
        """The map g, of shape `(out, in)`."""
        return self._index.array

    @property
    def weight(self) -> Float[Array, "out in"]:
        """The dense matrix W that the free weights `v` stand for."""
        padded = jnp.concatenate([jnp.zeros(1, self.v.dtype), self.v])
        return padded[self.index]

    def __call__(self, x: Float[Array, " in"]) -> Float[Array, " out"]:
        y = self.weight @ x
        return y if self.bias is None else y + self.bias
