"""What kind of point a flow came to."""

import equinox as eqx


class VERDICTS(eqx.Enumeration):
    """What a flow to `t1=inf` ended at: `trajectory.stats["verdict"]`."""

    undecided = (
        "A stationary point, of a kind that was not decided: beyond the flat directions "
        "that laws explain the Hessian has others, which may go up or down."
    )
    minimum = (
        "A minimum: the Hessian has no negative eigenvalue, and where it is zero the "
        "loss is flat."
    )
    strict_saddle = (
        "A strict saddle: stationary, with a negative eigenvalue of the Hessian. The flow "
        "does not leave it."
    )
    degenerate_saddle = (
        "A saddle without negative curvature: the loss falls along directions in which "
        "the Hessian is zero. The flow does not leave it."
    )
    diverges = (
        "No stationary point: the data are separable, so that the loss goes to 0 and the "
        "weights to infinity. What there is belongs to a finite time."
    )
    not_reached = "No stationary point was reached."
