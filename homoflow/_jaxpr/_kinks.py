"""A network whose slopes are inputs and whose pre-activations are outputs.

A piecewise-linear unit a = φ(z), φ(z) = low·z below 0 and high·z above, is replaced by
a = slope·z + lift. The flow of a network with kinks needs all of it: on which side every
z is, the gradient at slopes between low and high, and (through `lift`) ∂L/∂a. The
function is read, not run: whatever Python code a model is made of, its jaxpr shows its
kinks.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun
from jaxtyping import Array, Float, PyTree

from ._nonsmooth import (
    ACTIVATIONS,
    inner_jaxprs,
    is_in,
    label_of,
    reaching,
    smoothed_at_once,
    visit,
)

#: Calls that are no more than their body.
_TRANSPARENT = frozenset({"jit", "pjit", "closed_call", "core_call", "remat2", "remat"})
#: Functions whose own derivative rule is that of their body off the kink.
_OWN_RULE_AGREES = frozenset({"relu"})
_COMPARISONS = {"gt": True, "ge": True, "lt": False, "le": False}
#: Operations that hand a constant on.
_KEEPS_CONSTANT = frozenset({"broadcast_in_dim", "convert_element_type", "reshape"})


@dataclasses.dataclass(frozen=True)
class Product:
    """A weight that enters only once, as the matrix of a matrix-vector product.

    Then its share of a gradient is an outer product of the vector and of the gradient
    with respect to the result.

    - `leaf`: its place among the leaves of the weights.
    - `size`: of the result.
    - `is_transposed`: whether the result is xᵀW rather than Wx.
    """

    leaf: int
    size: int
    is_transposed: bool


@dataclasses.dataclass(frozen=True)
class Operation:
    """A kinked operation as a person would call it (relu, abs, …), and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class KinkedFunction:
    """`fn(weights, others, x)` with its kinks laid open; made by `with_kinks`.

    - `count`: how many kinks there are.
    - `operations`: what they are the kinks of, in order of evaluation; the kinks of one
        are numbered as the entries of its array.
    - `depth`: the largest number of kinks in a row between input and output.
    - `refused`: what else is not smooth in the weights, by name. If there is any, the
        transformed function still holds these operations as they are.
    - `products`: the weights whose gradients are outer products.
    """

    count: int
    operations: tuple[Operation, ...]
    depth: int
    refused: tuple[str, ...]
    products: tuple[Product, ...]
    _closed: ClosedJaxpr
    _structure: Any

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
        slopes: Float[Array, " kinks"],
        lift: Float[Array, " kinks"],
        others: PyTree[Array],
        x: PyTree[Array],
    ) -> tuple[PyTree[Array], Float[Array, " kinks"], list[Array]]:
        """The prediction, all z, and the vectors that `products` are products with."""
        reader = self._read((weights, others, x), slopes, lift)
        vectors = [reader.vectors[p.leaf] for p in self.products]
        prediction = reader.prediction(self._structure)
        return prediction, reader.preactivations(slopes), vectors

    def tapped(
        self,
        weights: PyTree[Array],
        taps: list[Array],
        slopes: Float[Array, " kinks"],
        lift: Float[Array, " kinks"],
        others: PyTree[Array],
        x: PyTree[Array],
    ) -> Float[Array, " kinks"]:
        """All z with `taps[i]` added to the i-th product."""
        given = {p.leaf: tap for p, tap in zip(self.products, taps, strict=True)}
        reader = self._read((weights, others, x), slopes, lift, given)
        return reader.preactivations(slopes)

    def slopes(
        self, weights: PyTree[Array], others: PyTree[Array], x: PyTree[Array]
    ) -> tuple[Float[Array, " kinks"], Float[Array, " kinks"]]:
        """The slopes below and above each kink. They do not depend on the weights."""
        reader = self._read((weights, others, x), None, None)
        low, high = (
            jnp.concatenate([side.ravel() for side in sides])
            for sides in (reader.low, reader.high)
        )
        return low, high

    def _read(self, arguments, slopes, lift, taps=None) -> "_Reader":
        reader = _Reader(len(jax.tree.leaves(arguments[0])), slopes, lift, taps or {})
        return reader.start(self._closed, jax.tree.leaves(arguments))


def with_kinks(
    fn: Callable[[PyTree, PyTree, PyTree], PyTree],
    weights: PyTree,
    others: PyTree,
    x: PyTree,
) -> KinkedFunction:
    """Lay open the kinks of `fn(weights, others, x)`, a prediction for one sample x.

    Found are relu, leaky relu, |z|, max and min of z with 0 or of two multiples of z,
    and choices by the sign of z between multiples of z, wherever z depends on the
    weights, in dense, convolutional, residual and weight-sharing code. Kinks inside
    loops and branches, and everything else that is not smooth, are named in `refused`.

    Only shapes and dtypes of the arguments are looked at.
    """
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (weights, others, x)
    )
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*shapes)
    readers = []

    def read(*leaves):
        reader = _Reader(len(jax.tree.leaves(weights)), None, None, {})
        readers.append(reader.start(closed, leaves))

    jax.eval_shape(read, *jax.tree.leaves(shapes))
    (reader,) = readers
    products = tuple(p for p in reader.products if reader.uses[p.leaf] == 1)
    return KinkedFunction(
        count=reader.offset,
        operations=tuple(reader.operations),
        depth=reader.depth,
        refused=tuple(sorted(reader.refused)),
        products=products,
        _closed=closed,
        _structure=jax.tree.structure(out),
    )


@dataclasses.dataclass(eq=False)
class _Value:
    """An array on its way through the function, and what is known about it.

    - `constant`: its only entry, if that is known.
    - `parent`: another value and the factor that this one is of it.
    - `sign`: a value, and whether this one says that it is positive (or negative).
    - `leaf`: which of the weights it is.
    """

    array: Any
    depends: bool = False
    depth: int = 0
    constant: Any = None
    parent: tuple["_Value", Any] | None = None
    sign: tuple["_Value", bool] | None = None
    leaf: int | None = None

    def factor_of(self, base: "_Value") -> Any:
        """c in self = c·base, or `None`."""
        if self is base:
            return 1.0
        if self.constant == 0:
            return 0.0
        if self.parent is None:
            return None
        above, factor = self.parent
        rest = above.factor_of(base)
        return None if rest is None else factor * rest

    def ancestors(self) -> list["_Value"]:
        return [self] if self.parent is None else [self, *self.parent[0].ancestors()]


class _Reader:
    """One pass through a jaxpr. With `slopes = None` it only looks around."""

    def __init__(self, weight_count: int, slopes, lift, taps: dict[int, Array]):
        self.weight_count = weight_count
        self.given_slopes, self.given_lift, self.taps = slopes, lift, taps
        self.offset, self.depth = 0, 0
        self.within: list[str] = []
        self.operations: list[Operation] = []
        self.pre: list[Array] = []
        self.low: list[Array] = []
        self.high: list[Array] = []
        self.refused: set[str] = set()
        self.uses: Counter[int] = Counter()
        self.products: list[Product] = []
        self.vectors: dict[int, Array] = {}
        self.outputs: list[_Value] = []

    def start(self, closed: ClosedJaxpr, leaves) -> "_Reader":
        n = self.weight_count
        values = [
            _Value(a, depends=i < n, leaf=i if i < n else None)
            for i, a in enumerate(leaves)
        ]
        everything = [True] * len(closed.jaxpr.outvars)
        self.outputs = self.run(closed.jaxpr, closed.consts, values, everything)
        self._count_uses(self.outputs)
        return self

    def prediction(self, structure) -> PyTree[Array]:
        return jax.tree.unflatten(structure, [v.array for v in self.outputs])

    def preactivations(self, like: Array) -> Array:
        return jnp.concatenate([z.ravel() for z in self.pre]) if self.pre else like

    def run(
        self, jaxpr: Jaxpr, consts, values: list[_Value], reaches: list[bool]
    ) -> list[_Value]:
        known: dict[Any, _Value] = {}
        known.update(zip(jaxpr.invars, values, strict=True))
        known.update(zip(jaxpr.constvars, map(_Value, consts), strict=True))
        wanted = reaching(jaxpr, reaches)

        def read(atom) -> _Value:
            return _literal(atom) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            incoming = [read(v) for v in eqn.invars]
            outgoing = [is_in(v, wanted) for v in eqn.outvars]
            smooth = smoothed_at_once(jaxpr, eqn)
            results = self._apply(eqn, incoming, outgoing, smooth)
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _apply(
        self, eqn, incoming: list[_Value], outgoing: list[bool], smooth: bool
    ) -> list[_Value]:
        if eqn.primitive.name in _TRANSPARENT and not smooth:
            return self._enter(eqn, incoming, outgoing)
        names = set()
        if any(v.depends for v in incoming) and not smooth:
            names, _ = visit(eqn, [v.depends for v in incoming], outgoing)
        if not names:
            return self._bind(eqn, incoming)
        if label_of(eqn) in _OWN_RULE_AGREES:
            return self._enter(eqn, incoming, outgoing)
        kink = _kink_of(eqn, incoming)
        if kink is not None:
            named = (label for label in self.within[::-1] if label in ACTIVATIONS)
            return [self._open(next(named, eqn.primitive.name), *kink)]
        self.refused |= _refusal(eqn, names)
        return self._bind(eqn, incoming)

    def _enter(self, eqn, incoming: list[_Value], outgoing: list[bool]):
        (body,) = (v for v in eqn.params.values() if isinstance(v, ClosedJaxpr | Jaxpr))
        consts = ()
        if isinstance(body, ClosedJaxpr):
            body, consts = body.jaxpr, body.consts
        self.within.append(label_of(eqn))
        results = self.run(body, consts, incoming, outgoing)
        self.within.pop()
        return results

    def _bind(self, eqn, incoming: list[_Value]) -> list[_Value]:
        self._count_uses(incoming)
        arrays = _evaluated(eqn, [v.array for v in incoming])
        depends = eqn.primitive.name != "stop_gradient" and any(
            v.depends for v in incoming
        )
        depth = max((v.depth for v in incoming), default=0)
        results = [_Value(a, depends, depth) for a in arrays]
        self._note_product(eqn, incoming, results)
        _note_facts(eqn, incoming, results[0] if results else None)
        return results

    def _count_uses(self, values: list[_Value]) -> None:
        self.uses.update(v.leaf for v in values if v.leaf is not None)

    def _note_product(self, eqn, incoming: list[_Value], results: list[_Value]):
        product = _product_of(eqn, incoming)
        if product is None:
            return
        leaf, (vector,) = product.leaf, (v for v in incoming if v.leaf != product.leaf)
        self.products.append(product)
        self.vectors[leaf] = vector.array
        if leaf in self.taps:
            results[0].array = results[0].array + self.taps[leaf]

    def _open(self, name: str, z: _Value, low, high) -> _Value:
        shape, dtype = z.array.shape, z.array.dtype
        self.operations.append(Operation(name, shape))
        start, self.offset = self.offset, self.offset + z.array.size
        low, high = (
            jnp.broadcast_to(jnp.asarray(slope, dtype), shape) for slope in (low, high)
        )
        self.pre.append(z.array)
        self.low.append(low)
        self.high.append(high)
        depth = z.depth + 1
        self.depth = max(self.depth, depth)
        if self.given_slopes is None:
            return _Value(high * z.array, True, depth)
        slope, lift = (
            a[start : self.offset].reshape(shape)
            for a in (self.given_slopes, self.given_lift)
        )
        return _Value(slope * z.array + lift, True, depth)


def _evaluated(eqn, arrays: list[Any]) -> list[Any]:
    """The results of an equation as it stands."""
    if not any(True for _ in inner_jaxprs(eqn)):
        result = eqn.primitive.bind(*arrays, **eqn.params)
        return result if eqn.primitive.multiple_results else [result]
    # How functions are bound with their derivative rules differs between versions of
    # JAX; a jaxpr of this one equation leaves that to it.
    given = [
        (v, a)
        for v, a in zip(eqn.invars, arrays, strict=True)
        if not isinstance(v, Literal)
    ]
    distinct = dict(given)
    names = next(inner_jaxprs(eqn)).debug_info._replace(
        arg_names=None, result_paths=None
    )
    body = Jaxpr((), list(distinct), eqn.outvars, [eqn], debug_info=names)
    return jaxpr_as_fun(ClosedJaxpr(body, ()))(*distinct.values())


def _kink_of(eqn, incoming: list[_Value]) -> tuple[_Value, Any, Any] | None:
    """(z, slope below, slope above) of an operation that is a kink at z = 0."""
    shape = eqn.outvars[0].aval.shape
    match eqn.primitive.name:
        case "abs":
            return incoming[0], -1.0, 1.0
        case "max" | "min":
            for z in (a for v in incoming for a in v.ancestors()):
                first, second = (v.factor_of(z) for v in incoming)
                if z.depends and first is not None and second is not None:
                    if z.array.shape != shape:
                        return None
                    small, large = (
                        jnp.minimum(first, second),
                        jnp.maximum(first, second),
                    )
                    is_max = eqn.primitive.name == "max"
                    return (z, small, large) if is_max else (z, large, small)
        case "select_n" if len(incoming) == 3 and incoming[0].sign is not None:
            z, says_positive = incoming[0].sign
            when_false, when_true = (v.factor_of(z) for v in incoming[1:])
            if when_false is None or when_true is None or z.array.shape != shape:
                return None
            if says_positive:
                return z, when_false, when_true
            return z, when_true, when_false
    return None


def _product_of(eqn, incoming: list[_Value]) -> Product | None:
    """The matrix-vector product of a weight that an equation is, if it is one."""
    if eqn.primitive.name != "dot_general":
        return None
    contracted, (left_batch, _) = eqn.params["dimension_numbers"]
    for matrix, vector, axes in zip(incoming, incoming[::-1], contracted, strict=True):
        is_matrix = matrix.leaf is not None and matrix.array.ndim == 2
        if is_matrix and vector.array.ndim == 1 and len(axes) == 1 and not left_batch:
            assert matrix.leaf is not None
            size = matrix.array.shape[1 - axes[0]]
            return Product(matrix.leaf, size, is_transposed=axes[0] == 0)
    return None


def _note_facts(eqn, incoming: list[_Value], result: _Value | None) -> None:
    """Whether a result is a constant, a multiple of a value, or tells its sign."""
    if result is None:
        return
    name = eqn.primitive.name
    if name in _KEEPS_CONSTANT:
        result.constant = incoming[0].constant
    match name, incoming:
        case "mul", (a, b) if not b.depends:
            result.parent = a, b.array
        case "mul", (a, b) if not a.depends:
            result.parent = b, a.array
        case "div", (a, b) if not b.depends:
            result.parent = a, 1 / b.array
        case "neg", (a,):
            result.parent = a, -1.0
        case "convert_element_type", (a, *_) if a.array.dtype == result.array.dtype:
            result.parent = a, 1.0
        case (("gt" | "ge" | "lt" | "le"), (a, b)) if b.constant == 0:
            result.sign = a, _COMPARISONS[name]
        case (("gt" | "ge" | "lt" | "le"), (a, b)) if a.constant == 0:
            result.sign = b, not _COMPARISONS[name]


def _refusal(eqn, names: set[str]) -> set[str]:
    """What to call an operation that cannot be followed."""
    label = label_of(eqn)
    if eqn.primitive.name.startswith("custom_"):
        return {label or eqn.primitive.name}
    if any(True for _ in inner_jaxprs(eqn)):
        return {f"{name} in {eqn.primitive.name}" for name in names}
    return names


def _literal(atom: Literal) -> _Value:
    value = np.asarray(atom.val)
    return _Value(atom.val, constant=value.item() if value.size == 1 else None)
