"""What kind of point a flow came to."""

import equinox as eqx


class StationaryKind(eqx.Enumeration):
    """Where `flow` with `t1=inf` ended: `trajectory.stats["stationary_kind"]`."""

    not_reached = "No stationary point: none was reached"
    minimum = (
        "A minimum: the Hessian has no negative eigenvalue, and along directions where it "
        "is zero the loss is flat, by a symmetry or measured, or as low as it can be."
    )
    strict_saddle = (
        "A strict saddle: the Hessian has a negative eigenvalue, and yet the flow comes to "
        "this point and stays."
    )
    degenerate_saddle = (
        "A degenerate saddle: the Hessian has no negative eigenvalue, but the loss falls "
        "along directions where it is zero. The flow has come to a halt there, to rounding."
    )
    undecided = (
        "A stationary point of undecided kind: the Hessian has no negative eigenvalue, but "
        "it has zero ones which no law explains and along which the loss is not flat, or "
        "they were not counted."
    )
    diverges = (
        "No stationary point: the data are separable, so that the loss goes to 0 and the "
        "weights to infinity."
    )
    diverges_in_direction = (
        "No stationary point, diverges in direction: the data are separable, so that "
        "the weights go to infinity, in a direction that converges to a point of maximal "
        "margin."
    )
