"""Which outputs of a traced function depend on none of its inputs."""

from jax.extend.core import ClosedJaxpr

from ._interpreter import interpret


def outputs_without_inputs(closed: ClosedJaxpr) -> list[bool]:
    """For each output, whether no input enters it, as far as the operations show.

    JAX leaves out what carries no derivative while it differentiates, so that the
    gradient of what stands behind `stop_gradient` is a plain array of zeros.
    """
    dependent = interpret(
        closed,
        [True] * len(closed.jaxpr.invars),
        lambda eqn, operands, site: [any(operands)] * len(eqn.outvars),
        lambda constant: False,
    )
    return [not d for d in dependent]
