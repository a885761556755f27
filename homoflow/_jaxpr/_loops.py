"""What in a loop depends on weights: a counter does not."""

from collections.abc import Callable

from jax.extend.core import ClosedJaxpr

LOOPS = frozenset({"scan", "while"})
#: For each jaxpr of a loop, which of its inputs depend.
_Inputs = list[tuple[ClosedJaxpr, list[bool]]]


def loop_dependences(
    eqn,
    depends: list[bool],
    flow: Callable[[ClosedJaxpr, list[bool]], list[bool]],
) -> tuple[_Inputs, list[bool]]:
    """Which inputs of a loop's jaxprs depend on weights, and which of its results.

    What one pass hands to the next depends on weights if it does at the start or after
    any pass: the least such choice, found by going through the body until nothing is
    added. `flow` says which outputs of a jaxpr depend, given which of its inputs do.
    """
    if eqn.primitive.name == "scan":
        return _scan(eqn, depends, flow)
    return _while(eqn, depends, flow)


def scan_counts(eqn) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried on."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    # From jax 0.12 on it has the inputs as trees: constants, carried, entries.
    constants, carried, _ = eqn.params["ft_in"].elts
    return len(constants.vals), len(carried.vals)


def _scan(eqn, depends, flow) -> tuple[_Inputs, list[bool]]:
    num_constants, num_carried = scan_counts(eqn)
    constants = depends[:num_constants]
    carried = depends[num_constants : num_constants + num_carried]
    entries = depends[num_constants + num_carried :]
    body = eqn.params["jaxpr"]
    while True:
        outputs = flow(body, [*constants, *carried, *entries])
        after = _either(carried, outputs[:num_carried])
        if after == carried:
            return [(body, [*constants, *carried, *entries])], outputs
        carried = after


def _while(eqn, depends, flow) -> tuple[_Inputs, list[bool]]:
    of_condition, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    first = depends[:of_condition]
    constants = depends[of_condition : of_condition + of_body]
    carried = depends[of_condition + of_body :]
    while True:
        after = _either(carried, flow(body, [*constants, *carried]))
        if after == carried:
            break
        carried = after
    inputs = [(condition, [*first, *carried]), (body, [*constants, *carried])]
    # How many passes there are may depend on weights, and then everything does.
    (is_open,) = flow(condition, [*first, *carried])
    return inputs, [True] * len(carried) if is_open else carried


def _either(a: list[bool], b: list[bool]) -> list[bool]:
    return [x or y for x, y in zip(a, b, strict=True)]
