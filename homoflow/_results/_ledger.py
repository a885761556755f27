"""The exact account of what discrete steps do to conservation laws."""

from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._jax._tracing import is_concrete

#: The parts of an account, as they are shown.
PARTS = (
    "discretization", "gradient", "momentum", "decay", "transformation", "unattributed",
)  # fmt: skip
#: In place of all but the first, where the gradient is not known.
FIRST_ORDER = "first_order"


class BatchSplit(eqx.Module):
    """What minibatch noise adds to a law in one step, at each recorded step.

    A step of −η times the batch's gradient g = ḡ + n, with ḡ the gradient of the full
    data set, adds η²q(g) = `mean` + `cross` + `noise`. In the mean over batches `cross`
    is 0 and `noise` is η² tr(AΣ), with Σ the covariance of g.

    These are of single steps and not summed over time: entry i along the leading axis is
    of the step that starts at the i-th recorded time, and there is none for the last.

    - `mean`: η²q(ḡ).
    - `cross`: 2η²·ḡᵀAn.
    - `noise`: η²q(n).
    """

    mean: Float[Array, "..."]
    cross: Float[Array, "..."]
    noise: Float[Array, "..."]


class Account(eqx.Module):
    """What changed one law h(w) = wᵀAw + bᵀw since the start, part by part.

    Every array has the law's own axes, after time (as `Trajectory.ts`) in a trajectory.
    A step w⁺ = w + u changes h by ⟨2Aw + b, u⟩ + uᵀAu, exactly. The second term is
    `discretization`; the first is divided by what the parts of u come from, and all are
    summed over the steps:

    - `discretization`: q(u) = uᵀAu of the whole step, η²q(g) in gradient descent. The
        flow has no such term.
    - `gradient`: ⟨2Aw + b, −ηg⟩ of the part of u that is a multiple of the present
        gradient: 0 to rounding for a law, whatever the multiple (schedules, clipping by
        the norm). What else it may be is the leak of an approximate law, or of one that
        is not a law of this loss.
    - `momentum`: ⟨2Aw + b, ·⟩ of what the optimizer's memory m alone adds to the step, in
        heavy ball −ημ times the old velocity. Decay that went into the memory at earlier
        steps counts here.
    - `decay`: ⟨2Aw + b, ·⟩ of what the present weights alone add: weight decay, coupled
        (within the gradient) or decoupled.
    - `transformation`: ⟨2Aw + b, ·⟩ of the rest: of what turns the gradient off its
        direction, as Adam's preconditioner, signs and elementwise clipping do. The
        multiple of the gradient that is taken away first is its orthogonal projection.
        Different multiples for different arrays are in here too. So are memory and
        weights that do not simply add to the step (Adam's averages, decay ahead of Adam
        or of clipping by element): `Ledger.note` says so.
    - `unattributed`: ⟨2Aw + b, ·⟩ of what comes of neither gradient, memory nor weights,
        such as noise that the optimizer adds: `Ledger.note` says so.
    - `observed`: h now minus h at the start.
    - `explained`: the sum of all parts.
    - `rounding`: `observed` − `explained`. Of the order of the dtype's rounding of h times
        the square root of the number of steps. In float32 it may well exceed the
        discretization. What is larger than `largest_rounding`, a bound, means that
        something else moved the weights: `Ledger.note` says so.

    An account by `homoflow.track(laws)`, which sees no gradients, has only
    `discretization` and `first_order`, the sum of all others.
    """

    observed: Float[Array, "..."]
    parts: dict[str, Float[Array, "..."]]
    batch: BatchSplit | None = None
    largest_rounding: Float[Array, "..."] | None = None

    @property
    def discretization(self) -> Float[Array, "..."]:
        return self.parts["discretization"]

    @property
    def gradient(self) -> Float[Array, "..."]:
        return self._part("gradient")

    @property
    def momentum(self) -> Float[Array, "..."]:
        return self._part("momentum")

    @property
    def decay(self) -> Float[Array, "..."]:
        return self._part("decay")

    @property
    def transformation(self) -> Float[Array, "..."]:
        return self._part("transformation")

    @property
    def unattributed(self) -> Float[Array, "..."]:
        return self._part("unattributed")

    @property
    def first_order(self) -> Float[Array, "..."]:
        """⟨2Aw + b, u⟩ of the whole step: everything but `discretization`."""
        others = (v for k, v in self.parts.items() if k != "discretization")
        return sum(others, start=jnp.zeros_like(self.observed))

    @property
    def explained(self) -> Float[Array, "..."]:
        return self.discretization + self.first_order

    @property
    def rounding(self) -> Float[Array, "..."]:
        return self.observed - self.explained

    @property
    def excess(self) -> Float[Array, ""]:
        """How much of `rounding` cannot be rounding; 0 if it all can."""
        bound = self.largest_rounding
        if bound is None:
            return jnp.zeros(())
        axes = (1,) * (self.rounding.ndim - bound.ndim)
        excess = jnp.abs(self.rounding) - bound.reshape(bound.shape + axes)
        return jnp.max(jnp.where(jnp.isnan(excess), 0, excess), initial=0)

    def _part(self, name: str) -> Float[Array, "..."]:
        if FIRST_ORDER in self.parts:
            raise AttributeError(
                f"This account has no `{name}`: `homoflow.track(laws)` sees updates but "
                "no gradients. Wrap the whole optimizer, `homoflow.track(laws, "
                "optimizer)`, or read `first_order`, the sum of what it would be split "
                "into."
            )
        return self.parts.get(name, jnp.zeros_like(self.observed))

    def __repr__(self) -> str:
        shown = [name for name in (*PARTS, FIRST_ORDER) if name in self.parts]
        if not is_concrete((self.observed, self.parts)):
            return f"Account(shape: {self.observed.shape}, parts: {shown})"
        sizes = [f"{name} {_largest(self.parts[name]):.3g}" for name in shown]
        return (
            f"Account(largest |observed| {_largest(self.observed):.3g}: "
            f"{', '.join(sizes)}, rounding {_largest(self.rounding):.3g})"
        )


class Ledger(eqx.Module, Mapping):
    """An exact account of every law along a run of discrete steps: law name → `Account`.

    `homoflow.descend(..., ledger=True)` returns it as `trajectory.ledger`, and
    `homoflow.track` keeps it in any training loop. Only parts that the optimizer can
    have are in `Account.parts`; which those are was read off the optimizer itself.

    - `parts_note`: which of its effects cannot be told apart, in a sentence; empty if all
        can.
    - `note`: that, and whether something else moved the weights.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    gd = hf.descend(model, (x, x[:, :1]), 50, learning_rate=0.1, ledger=True)
    account = gd.ledger["neurons[1]"]
    account.observed.shape  # (51, 8), and so are account.discretization, …
    account.rounding  # 1e-16: the parts add up
    ```
    """

    accounts: dict[str, Account]
    parts_note: str = eqx.field(static=True, default="")

    def first(self, times: int) -> "Ledger":
        """The ledger at the first so many of its times."""

        def cut(tree: Any, times: int = times) -> Any:
            return jax.tree.map(lambda array: array[:times], tree)

        accounts = {
            name: Account(
                observed=cut(account.observed),
                parts=cut(account.parts),
                batch=cut(account.batch, times - 1),
                largest_rounding=cut(account.largest_rounding),
            )
            for name, account in self.accounts.items()
        }
        return Ledger(accounts, self.parts_note)

    @property
    def note(self) -> str:
        """What to know before believing the numbers; empty if there is nothing."""
        sentences = [self.parts_note] if self.parts_note else []
        # Of numbers that are being traced nothing can be said yet.
        if is_concrete(self.accounts):
            moved = {name: float(self[name].excess) for name in self}
            moved = {name: excess for name, excess in moved.items() if excess > 0}
            if moved:
                worst = max(moved, key=lambda name: moved[name])
                sentences.append(
                    f"The parts do not add up to the change of {', '.join(moved)}: "
                    f"{_largest(self[worst].rounding):.3g} is left of {worst}, more than "
                    "rounding can be. Something else moved the weights."
                )
        return " ".join(sentences)

    def __getitem__(self, name: str) -> Account:
        if name not in self.accounts:
            raise KeyError(
                f"No account of a law {name!r}: there are {list(self.accounts)}."
            )
        return self.accounts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.accounts)

    def __len__(self) -> int:
        return len(self.accounts)

    def __repr__(self) -> str:
        lines = [f"  {name}: {self[name]}" for name in self]
        lines += [f"  ({self.note})"] if self.note else []
        return "\n".join([f"Ledger of {len(self)} laws", *lines])


def _largest(values: Any) -> float:
    return float(jnp.max(jnp.abs(values), initial=0))
