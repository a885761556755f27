"""A network whose slopes are inputs and whose pre-activations are outputs.

A piecewise-linear unit a = φ(z), φ(z) = low·z below 0 and high·z above, is replaced by
a = slope·z + lift. The flow of a network with kinks needs all of it: on which side every
z is, the gradient at slopes between low and high, and (through `lift`) ∂L/∂a. The
function is read, not run: whatever Python code a model is made of, its jaxpr shows its
kinks.

A kink elsewhere than at 0 is one of the difference: max(a, b) = slope·a + (1 − slope)·b
with z = a − b, the largest of many is a tournament of pairs, and a function of z with
knots c_1, c_2, … is a sum with one kink for each z − c_i.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, Float, PyTree

from ._kink_interpreter import Given, Operation, Reader
from ._weight_products import Convolution, Product


@dataclasses.dataclass(frozen=True)
class KinkedFunction:
    """`fn(weights, others, x)` with its kinks laid open; made by `with_kinks`.

    - `count`: how many kinks there are.
    - `operations`: what they are the kinks of, in order of evaluation; the kinks of one
        are numbered as the entries of its array. A function with several knots, and
        the largest of many, are several.
    - `depth`: the largest number of kinks in a row between input and output.
    - `refused`: what else is not smooth in the weights, by name. If there is any, the
        transformed function still holds these operations as they are.
    - `products`: the weights whose gradients are outer products; `convolutions`: those
        whose gradients are sums of them over positions.
    """

    count: int
    operations: tuple[Operation, ...]
    depth: int
    refused: tuple[str, ...]
    products: tuple[Product, ...]
    convolutions: tuple[Convolution, ...]
    _closed: ClosedJaxpr
    _structure: Any

    @property
    def factored(self) -> tuple[Product | Convolution, ...]:
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
        lift: Float[Array, " kinks"],
        others: PyTree[Array],
        x: PyTree[Array],
    ) -> tuple[PyTree[Array], Float[Array, " kinks"]]:
        """The prediction with a = slopes·z + lift at every kink, and all z."""
        return self.opened(weights, slopes, lift, others, x)[:2]

    def opened(
        self,
        weights: PyTree[Array],
        slopes: Float[Array, " kinks"] | Callable[[Array, int], Array],
        lift: Float[Array, " kinks"],
        others: PyTree[Array],
        x: PyTree[Array],
    ) -> tuple[PyTree[Array], Float[Array, " kinks"], list[Array]]:
        """The prediction, all z, and the vectors and images that `factored` are with.

        `slopes` may be a function of an operation's z and of the number of its first
        kink: then slopes are found on the way.
        """
        reader = self._read((weights, others, x), Given(slopes, lift))
        vectors = [reader.vectors[p.leaf] for p in self.factored]
        prediction = jax.tree.unflatten(self._structure, reader.outputs)
        return prediction, reader.preactivations(lift), vectors

    def tapped(
        self,
        weights: PyTree[Array],
        taps: list[Array],
        slopes: Float[Array, " kinks"],
        lift: Float[Array, " kinks"],
        others: PyTree[Array],
        x: PyTree[Array],
    ) -> tuple[PyTree[Array], Float[Array, " kinks"]]:
        """The prediction and all z with `taps[i]` added to the i-th of `factored`."""
        given = {p.leaf: tap for p, tap in zip(self.factored, taps, strict=True)}
        reader = self._read((weights, others, x), Given(slopes, lift, given))
        prediction = jax.tree.unflatten(self._structure, reader.outputs)
        return prediction, reader.preactivations(slopes)

    def slopes(
        self, weights: PyTree[Array], others: PyTree[Array], x: PyTree[Array]
    ) -> tuple[Float[Array, " kinks"], Float[Array, " kinks"]]:
        """The slopes below and above each kink. They do not depend on the weights."""
        reader = self._read((weights, others, x), Given())
        low, high = (
            jnp.concatenate([side.ravel() for side in sides])
            for sides in (reader.low, reader.high)
        )
        return low, high

    def _read(self, arguments, given: Given) -> Reader:
        leaves = jax.tree.leaves(arguments)
        return Reader(self._closed, leaves, len(jax.tree.leaves(arguments[0])), given)


def with_kinks(
    fn: Callable[[PyTree, PyTree, PyTree], PyTree],
    weights: PyTree,
    others: PyTree,
    x: PyTree,
) -> KinkedFunction:
    """Lay open the kinks of `fn(weights, others, x)`, a prediction for one sample x.

    Found are max and min of anything, also over axes and windows; |z|; continuous
    choices between linear functions of z where z passes a number, or between multiples
    of z by its sign, learned ones too; and `jax.nn.elu`: so all piecewise-linear
    activations of `jax.nn`, wherever z depends on the weights, in dense, convolutional,
    residual and weight-sharing code. Kinks inside loops and in branches that data
    choose, jumps, and everything else that is not smooth are named in `refused`.

    Only shapes and dtypes of the arguments are looked at.
    """
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, others, x)
    )
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    readers = []

    def read(*leaves):
        count = len(jax.tree.leaves(weights))
        readers.append(Reader(closed, leaves, count, Given()))

    jax.eval_shape(read, *jax.tree.leaves(shapes))
    (reader,) = readers
    factored = [p for p in reader.products if reader.uses[p.leaf] == 1]
    return KinkedFunction(
        count=reader.count,
        operations=tuple(reader.operations),
        depth=reader.depth,
        refused=tuple(sorted(reader.refused)),
        products=tuple(p for p in factored if isinstance(p, Product)),
        convolutions=tuple(p for p in factored if isinstance(p, Convolution)),
        _closed=closed,
        _structure=jax.tree.structure(out),
    )
