"""A network whose slopes are inputs and whose pre-activations are outputs.

A piecewise-linear unit a = φ(z), with φ(z) = low·z below 0 and high·z above, is replaced
by a = slope·z + offset, with `slope` and `offset` as inputs and z as an output. The flow of
a network with kinks needs all three: on which side of its kink every z is, the gradient at
slopes between low and high, and ∂L/∂a, which is the derivative by the offset. Whatever
Python code a model is made of, its jaxpr shows its kinks.

Other kinks are brought to this form: max(a, b) = slope·a + (1 − slope)·b with z = a − b,
the largest of many is a tournament of pairs, and a function of z with knots c_1, c_2, … is
a sum with one kink for each z − c_i.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, Float, PyTree

from ._kink_interpreter import KinkInterpreter
from ._kink_tape import Operation, Overrides
from ._weight_products import Convolution, MatrixProduct


@dataclasses.dataclass(frozen=True)
class PiecewiseSmoothFunction:
    """`fn(weights, others, x)` with its kinks exposed; made by `expose_kinks`.

    - `count`: how many kinks there are.
    - `operations`: what they are the kinks of, in order of evaluation; the kinks of one
        are numbered as the entries of its array. A function with several knots, and
        the largest of many, are several.
    - `depth`: the largest number of kinks in a row between input and output.
    - `unsupported`: what else is not smooth in the weights, by name. The transformed
        function still has these operations as they are.
    - `products`: the weights whose gradients are outer products; `convolutions`: those
        whose gradients are sums of them over positions.
    """

    count: int
    operations: tuple[Operation, ...]
    depth: int
    unsupported: tuple[str, ...]
    products: tuple[MatrixProduct, ...]
    convolutions: tuple[Convolution, ...]
    _closed: ClosedJaxpr
    _structure: Any

    @property
    def factored(self) -> tuple[MatrixProduct | Convolution, ...]:
        """The products, then the convolutions."""
        return *self.products, *self.convolutions

    @property
    def has_constants(self) -> bool:
        """Whether it holds values of arrays that `fn` closes over."""
        return bool(self._closed.consts)

    def forward(
        self,
        weights: PyTree[Array],
        slopes: Float[Array, " kinks"],
        offset: Float[Array, " kinks"],
        others: PyTree[Array],
        x: PyTree[Array],
    ) -> tuple[PyTree[Array], Float[Array, " kinks"]]:
        """The prediction with a = slopes·z + offset at every kink, and all z."""
        return self.evaluate(weights, slopes, offset, others, x)[:2]

    def evaluate(
        self,
        weights: PyTree[Array],
        slopes: Float[Array, " kinks"] | Callable[[Array, int], Array],
        offset: Float[Array, " kinks"],
        others: PyTree[Array],
        x: PyTree[Array],
    ) -> tuple[PyTree[Array], Float[Array, " kinks"], list[Array]]:
        """The prediction, all z, and what the weights of `factored` are multiplied with.

        `slopes` may be a function of an operation's z and of the number of its first
        kink: then slopes are found on the way.
        """
        done = self._interpret((weights, others, x), Overrides(slopes, offset))
        vectors = [done.vectors[p.leaf] for p in self.factored]
        prediction = jax.tree.unflatten(self._structure, done.outputs)
        return prediction, done.preactivations(offset), vectors

    def evaluate_with_taps(
        self,
        weights: PyTree[Array],
        taps: list[Array],
        slopes: Float[Array, " kinks"],
        offset: Float[Array, " kinks"],
        others: PyTree[Array],
        x: PyTree[Array],
    ) -> tuple[PyTree[Array], Float[Array, " kinks"]]:
        """The prediction and all z with `taps[i]` added to the i-th of `factored`."""
        by_leaf = {p.leaf: tap for p, tap in zip(self.factored, taps, strict=True)}
        overrides = Overrides(slopes, offset, by_leaf)
        done = self._interpret((weights, others, x), overrides)
        prediction = jax.tree.unflatten(self._structure, done.outputs)
        return prediction, done.preactivations(slopes)

    def slopes(
        self, weights: PyTree[Array], others: PyTree[Array], x: PyTree[Array]
    ) -> tuple[Float[Array, " kinks"], Float[Array, " kinks"]]:
        """The slopes below and above each kink. They do not depend on the weights."""
        tape = self._interpret((weights, others, x), Overrides()).tape
        low, high = (
            jnp.concatenate([side.ravel() for side in sides])
            for sides in (tape.low, tape.high)
        )
        return low, high

    def _interpret(self, arguments, overrides: Overrides) -> KinkInterpreter:
        leaves = jax.tree.leaves(arguments)
        num_weights = len(jax.tree.leaves(arguments[0]))
        return KinkInterpreter(self._closed, leaves, num_weights, overrides)


def expose_kinks(
    fn: Callable[[PyTree, PyTree, PyTree], PyTree],
    weights: PyTree,
    others: PyTree,
    x: PyTree,
) -> PiecewiseSmoothFunction:
    """Expose the kinks of `fn(weights, others, x)`, a prediction for one sample x.

    Found are max and min of anything, also over axes and windows; |z|; continuous
    choices between linear functions of z where z passes a number, or between multiples
    of z by its sign, learned ones too; and `jax.nn.elu`: so all piecewise-linear
    activations of `jax.nn`, wherever z depends on the weights, in dense, convolutional,
    residual and weight-sharing code. Kinks inside loops and in branches that data
    choose, jumps, and everything else that is not smooth are named in `unsupported`.

    Only shapes and dtypes of the arguments are looked at.
    """
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, others, x)
    )
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    num_weights = len(jax.tree.leaves(weights))
    passes: list[KinkInterpreter] = []

    def interpret(*leaves):
        passes.append(KinkInterpreter(closed, leaves, num_weights, Overrides()))

    jax.eval_shape(interpret, *jax.tree.leaves(shapes))
    (done,) = passes
    tape, factored = done.tape, [p for p in done.products if done.uses[p.leaf] == 1]
    return PiecewiseSmoothFunction(
        count=tape.count,
        operations=tuple(tape.operations),
        depth=tape.depth,
        unsupported=tuple(sorted(tape.unsupported)),
        products=tuple(p for p in factored if isinstance(p, MatrixProduct)),
        convolutions=tuple(p for p in factored if isinstance(p, Convolution)),
        _closed=closed,
        _structure=jax.tree.structure(out),
    )
