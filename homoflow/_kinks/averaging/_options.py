"""The name under which averaging over kinks is asked for."""

from typing import final

import equinox as eqx


@final
class Averaged(eqx.Module):
    """The approximate flow of a network with kinks, as `solver` of `homoflow.flow`.

    What `flow` does by itself where it does not follow kinks one by one: a method with a
    smallest step averages over them, and `stats["error_estimate"]` says how well. Ask
    for it by name where `flow` would choose the exact flow (`homoflow.Filippov`): to
    differentiate in reverse mode, or to compare the two.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), 5.0, rtol=1e-6, solver=hf.Averaged())
    print(flow.stats["error_estimate"])
    ```
    """
