"""`certify_margin`: whether a direction is one that late gradient flow converges to."""

from jaxtyping import PyTree

from .._jax._arguments import check_flag
from .._methods.margin import certificate_at, polish as polished, why_no_certificate
from .._problem._losses import LogisticLoss, LossLike
from .._problem._problem import make_problem
from .._problem._trainable import Trainable
from .._results._margin_certificate import MarginCertificate


def certify_margin(
    model: PyTree,
    data: PyTree,
    *,
    loss: LossLike = LogisticLoss(),  # noqa: B008
    trainable: Trainable = None,
    polish: bool = False,
) -> MarginCertificate:
    """How well the direction of the weights fulfils the conditions of a maximal margin.

    With a loss of exponential type on separable data, gradient flow of a homogeneous
    network converges in direction to a Karush–Kuhn–Tucker point of

        min ½‖w‖²  subject to  m_i(w) ≥ 1 for all samples i

    [Lyu & Li 2020; Ji & Telgarsky 2020], m_i the margin: y·f, or f_y − f_c for each other
    class c. The weights are rescaled until the smallest margin is 1. The multipliers are
    those λ ≥ 0 that make ‖w − Σ λ_i ∇m_i‖² + Σ λ_i² (m_i − 1)² least (non-negative least
    squares). Where a sample is on a kink (to 1e-9 of ‖w‖), ∇m_i is any element of Clarke's
    subdifferential: between its slopes on both sides, for each kink and margin by itself.
    Of kinks that the exact flow cannot follow it is what JAX takes for it.

    **Arguments:** as for `homoflow.late_flow`. `model` is its end, say.

    - `polish`: go on by Newton's method to the point next to it at which the conditions
        hold to rounding, with the support that the multipliers show (corrected where a
        margin falls below 1 or a multiplier below 0). It is done up to 1,000 weights, and
        kept only if the residuals fall and the direction moves by at most 0.1, which
        `moved` of the certificate says. That the flow tends there is not proven by it:
        `homoflow.flow` with `t1=inf` compares two late times.

    **Returns:** a `homoflow.MarginCertificate`; `is_kkt()` compares its residuals with a
    tolerance. At a finite time they fall like 1/log t at best.
    `model` of the certificate is the point itself.

    **Raises:** `ValueError` for bad input, another loss, data that the model does not
    separate, margins that are not homogeneous (biases above the first layer, tanh), more
    than 20 million derivatives, and a sample on several kinks of a network with kinks above
    kinks.

    ```python
    model = hf.MLP((3, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    data = (x, jnp.sign(x[:, :1]))
    run = hf.late_flow(model, data, log_t1=1e8)
    certificate = hf.certify_margin(run.model, data)
    certificate.is_kkt(1e-6)  # True
    ```
    """
    problem = make_problem(model, data, loss=loss, trainable=trainable)
    check_flag("polish", polish)
    reason = why_no_certificate(problem)
    if reason is not None:
        raise ValueError(f"No margin can be certified here: {reason}.")
    certificate = certificate_at(problem)
    if not polish:
        return certificate
    return polished(problem, certificate) or certificate
