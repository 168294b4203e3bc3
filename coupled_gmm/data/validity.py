"""Whether an object is one that this package could have made: what files are held against, when they are written and read.

Types and shapes are those of the annotations, "K d" standing for the same numbers in all fields of an object. Any object may be
stacked on leading axes "*b", with all that it holds. Values are those that constructors let through, with room for the rounding of
programs. Of a component of weight zero nothing is asked, nor of the values of a result whose status says that some are not finite.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from coupled_gmm.core.status import Status
from coupled_gmm.gaussians.covariances import check_covariances

# Fields that hold objects stacked on one more axis, and its length, in the words of the annotations.
_STACKED = {("GraphFit", "plans"): "E", ("MixtureGraph", "nodes"): "V", ("FlowFit", "path"): "steps+1"}
_STACKED |= {("Fidelity", "alone"): "V"}
_ROUNDING = 10  # what programs may miss of a positive semi-definite matrix, in units of what constructors let through

Shape = tuple[int, ...]


class Invalid(ValueError):
    """An object that this package could not have made; the message says where, and what is wrong."""


def check(where: str, value: Any) -> None:
    """Raise `Invalid` where an object of the package, in lists, tuples and dicts or by itself, is none."""
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check(f"{where}[{i}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            check(f"{where}[{key!r}]", item)
    elif dataclasses.is_dataclass(value):
        _Object(where, value, None, True, {})


class _Object:
    """One object under check: what the words of its annotations stand for, and the axes it is stacked on.

    Args:
      lead: the axes that what holds it is stacked on; None where nothing does.
      finite: whether values are looked at.
      sizes: what words stand for already: a fit and its history share theirs.
    """

    def __init__(self, where: str, value: Any, lead: Shape | None, finite: bool, sizes: dict[str, int]):
        self.where, self.value, self.lead, self.sizes = where, value, lead, sizes
        self.name = type(value).__name__
        hints = typing.get_type_hints(type(value))
        fields = [field.name for field in dataclasses.fields(value)]
        # Arrays first, then the history: they say what the words stand for, and the axes of all that the object holds.
        fields.sort(key=lambda name: (not _holds_arrays(hints[name]), name != "history"))
        if "status" in fields:
            self.field("status", hints["status"])
            finite = finite and self._finite()
        self.finite = finite
        for name in fields:
            self.field(name, hints[name])
        _RELATIONS.get(self.name, lambda _: None)(self)
        if finite:
            _VALUES.get(self.name, lambda _: None)(self)

    def fail(self, name: str, what: str) -> typing.NoReturn:
        raise Invalid(f"{self.where}.{name}: {what}")

    def require(self, name: str, truth: Any, what: str) -> None:
        if not np.all(truth):
            self.fail(name, what)

    def array(self, name: str) -> np.ndarray:
        return np.asarray(getattr(self.value, name))

    def held(self, name: str) -> Any:
        return getattr(self.value, name)

    def field(self, name: str, hint: Any) -> None:
        self._typed(name, getattr(self.value, name), hint)

    def _finite(self) -> bool:
        status = self.array("status")
        self.require("status", np.isin(status, list(Status)), "is no status")
        return not np.any(np.isin(status, [Status.NOT_FINITE, Status.LOST]))

    def _typed(self, name: str, value: Any, hint: Any) -> None:
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            if value is not None or types.NoneType not in inner:
                others = (one for one in inner if one is not types.NoneType)
                self._typed(name, value, type(value) if type(value) in inner else next(others))
        elif _is_array(hint):
            self._shaped(name, value, hint)
        elif origin is list:
            self._instance(name, value, list)
            for i, item in enumerate(value):
                self._typed(f"{name}[{i}]", item, inner[0])
        elif origin is tuple:
            self._instance(name, value, tuple)
            each = inner[:1] * len(value) if inner[1:] == (...,) else inner
            self.require(name, len(value) == len(each), f"has {len(value)} parts, not {len(each)}")
            for i, (item, one) in enumerate(zip(value, each, strict=True)):
                self._typed(f"{name}[{i}]", item, one)
        else:
            self._instance(name, value, hint)
            if dataclasses.is_dataclass(hint):
                sizes = self.sizes if name == "history" else {}
                _Object(f"{self.where}.{name}", value, self._below(name), self.finite, sizes)

    def _instance(self, name: str, value: Any, cls: type) -> None:
        self.require(name, type(value) is cls, f"is of type {type(value).__name__}, not {cls.__name__}")

    def _below(self, name: str) -> Shape | None:
        """The axes that a field of this object is stacked on; None where these are its own."""
        if self.name in ("Bootstrap", "MixtureFits", "PairFits"):
            return None
        axis = _STACKED.get((self.name, name))
        lead = self.lead or ()
        return lead if axis is None else (*lead, self._size(axis))

    def _size(self, word: str) -> int:
        name, _, more = word.partition("+")
        return int(name) if name.isdigit() else self.sizes[name] + int(more or 0)

    def _shaped(self, name: str, value: Any, hint: Any) -> None:
        """An array of this kind of numbers and, behind the axes that the object is stacked on, of this shape."""
        kinds = (hint.dtype[jax.Array, "..."], hint.dtype[np.ndarray, "..."])
        if not isinstance(value, kinds):
            given = getattr(value, "dtype", type(value).__name__)
            self.fail(name, f"expected an array of {hint.dtype.__name__.lower()}, got {given}")
        said, shape = hint.dim_str.removeprefix("*b").strip(), np.shape(value)
        words = said.split()
        if words and words[-1].startswith("*"):  # two, or left out
            words = [*words[:-1], "2"] if len(shape) > len(words) - 1 + len(self.lead or ()) else words[:-1]
        cut = len(shape) - len(words)
        if self.lead is None:
            self.lead = shape[: max(cut, 0)]
        if cut != len(self.lead) or shape[:cut] != self.lead:
            stacked = f", stacked in {self.lead}" if self.lead else ""
            self.fail(name, f"expected shape ({said}){stacked}, got {shape}")
        for word, size in zip(words, shape[cut:], strict=True):
            if not word.isdigit():
                self.sizes.setdefault(word, size)
            if self._size(word) != size:
                self.fail(name, f"expected shape ({said}) with {word} = {self._size(word)}, got {shape}")


def _is_array(hint: Any) -> bool:
    return hasattr(hint, "dim_str")


def _holds_arrays(hint: Any) -> bool:
    return _is_array(hint) or any(_is_array(one) for one in typing.get_args(hint))


def _mixture_sizes(o: _Object) -> None:
    o.require("means", o.sizes["K"] > 0 and o.sizes["d"] > 0, "has no component or no feature")


def _mixture_values(o: _Object) -> None:
    """As `from_moments` has them, but for the sum of the weights, which is taken as it is."""
    weights = o.array("weights").astype(np.float64)
    o.require("weights", np.isfinite(weights), "must be finite")
    o.require("weights", weights >= 0, "must be at least 0")
    o.require("weights", np.abs(weights.sum(-1) - 1) <= 1e-3, "must sum to 1 within 1e-3")
    present = weights > 0
    for name in ("means", "covariances", "remainders"):
        if o.held(name) is not None:
            o.require(name, np.isfinite(o.array(name)[present]), "must be finite")
    covariances, d = o.array("covariances"), o.sizes["d"]
    looked_at = np.where(present[..., None, None], covariances, np.eye(d)).reshape(-1, d, d)
    if len(looked_at):
        try:
            check_covariances(looked_at.astype(np.float64), _ROUNDING * float(np.finfo(covariances.dtype).eps))
        except ValueError as error:
            raise Invalid(f"{o.where}.{str(error).partition(';')[0]}") from error


def _pair_sizes(o: _Object) -> None:
    left, right = (o.held(name).means.shape[-1] for name in ("gmm0", "gmm1"))
    o.require("gmm1", left == right, f"has {right} features, and gmm0 has {left}")
    if o.held("links") is not None:
        sizes = _components(o.value)
        o.require("links", np.shape(o.held("links"))[-2:] == sizes, f"are no links of {sizes} components")


def _pair_values(o: _Object) -> None:
    _prices(o, o.held("balanced"))


def _prices(o: _Object, balanced: bool) -> None:
    epsilon, rho = o.array("epsilon"), o.array("rho")
    o.require("epsilon", np.isfinite(epsilon) & (epsilon > 0), "must be finite and above 0")
    o.require("rho", rho > 0, "must be above 0")
    o.require("rho", not balanced or np.isinf(rho), "must be infinite where transport is balanced")


def _plan_sizes(o: _Object) -> None:
    sizes = _components(o.held("pair"))
    given = o.sizes["K0"], o.sizes["K1"]
    o.require("cost", given == sizes, f"is {given} and its mixtures have {sizes} components")
    o.require(
        "potentials", any(o.held(name) is not None for name in ("potentials", "vertex")), "are missing, and a matrix"
    )
    o.require("n_iterations", o.array("n_iterations") >= 0, "must be at least 0")


def _components(pair: Any) -> tuple[int, int]:
    return pair.gmm0.means.shape[-2], pair.gmm1.means.shape[-2]


def _plan_values(o: _Object) -> None:
    """Numbers where there is mass: of an absent component anything may be said."""
    pair = o.held("pair")
    a, b = (np.asarray(gmm.weights) > 0 for gmm in (pair.gmm0, pair.gmm1))
    for name in ("potentials", "rests"):
        for side, present in enumerate((a, b) if o.held(name) is not None else ()):
            o.require(f"{name}[{side}]", ~np.isnan(np.asarray(o.held(name)[side])[present]), "must be numbers")
    both = a[..., :, None] & b[..., None, :]
    o.require("cost", ~np.isnan(o.array("cost")[both]), "must be numbers")
    if o.held("vertex") is not None:
        vertex = o.array("vertex")[both]
        o.require("vertex", np.isfinite(vertex) & (vertex >= 0), "must be finite and at least 0")


def _steps(o: _Object) -> None:
    """As many rows in the history as the fit has steps, or more; one more, where it begins before the first."""
    rows, n_steps = o.sizes["values"] - 1 if "values" in o.sizes else o.sizes["steps"], o.array("n_steps")
    o.require("n_steps", (n_steps >= 0) & (n_steps <= rows), f"must be from 0 to the {rows} of its history")
    if getattr(o.value, "start", None) is not None:
        o.require("start", o.array("start") >= 0, "must be at least 0")


def _mixture_fit(o: _Object) -> None:
    _steps(o)
    if o.held("statistics") is not None:
        sizes, given = (np.shape(o.held(name).means)[-2:] for name in ("gmm", "statistics"))
        o.require("statistics", given == sizes, f"are of {given} components and features, and gmm is of {sizes}")


def _statistics_values(o: _Object) -> None:
    """Scatters may miss being positive semi-definite: of few points they are rounding, which no floor has raised yet."""
    masses = o.array("masses").astype(np.float64)
    _finite_values("mass", "masses", "entropy")(o)
    for name in ("means", "remainders", "scatters"):
        o.require(name, np.isfinite(o.array(name)[masses > 0]), "must be finite")
    o.require("mass", o.array("mass") > 0, "must be above 0")
    o.require(
        "masses", (masses >= 0) & (np.abs(masses.sum(-1, keepdims=True) - 1) <= 1e-3), "must sum to 1 within 1e-3"
    )
    o.require("entropy", o.array("entropy") >= 0, "must be at least 0")


def _pair_fit(o: _Object) -> None:
    _steps(o)
    pair, plan = o.held("pair"), o.held("plan")
    for gmm, other in ((pair.gmm0, plan.pair.gmm0), (pair.gmm1, plan.pair.gmm1)):
        o.require("plan", np.shape(gmm.means) == np.shape(other.means), "is between mixtures of other sizes")
    columns = o.sizes["V"], o.sizes["E"]
    o.require("history", columns == (2, 1), f"has {columns} columns for nodes and edges, not (2, 1)")


def _stacked_fits(mixtures: Callable[[Any], list[Any]]) -> Callable[[_Object], None]:
    """Every fit has a row of a part, and mixtures no larger than those of that."""

    def relations(o: _Object) -> None:
        stacks, places, sizes = o.held("stacks"), o.array("places"), o.array("sizes")
        o.require(
            "reasons", len(o.held("reasons")) == len(stacks), "says nothing of some parts, or of more than there are"
        )
        o.require("stacks", [np.ndim(part.status) == 1 for part in stacks], "holds what is not stacked on one axis")
        room = [(len(part.status), *(gmm.means.shape[-2] for gmm in mixtures(part))) for part in stacks]
        for (part, row), size in zip(places.tolist(), sizes.tolist(), strict=True):
            o.require("places", 0 <= part < len(room) and 0 <= row < room[part][0], "names a row that is in no part")
            fits = all(1 <= k <= most for k, most in zip(size, room[part][1:], strict=True))
            o.require("sizes", fits, "has more components than its part")

    return relations


def _graph_fit(o: _Object) -> None:
    _steps(o)
    gmms, pair = o.held("gmms"), o.held("plans").pair
    o.require("gmms", len(gmms) == o.sizes["V"], f"are {len(gmms)}, and the history has {o.sizes['V']} nodes")
    features = {gmm.means.shape[-1] for gmm in (*gmms, pair.gmm0)}
    o.require("gmms", len(features) == 1, "differ in their features")
    size = max((gmm.means.shape[-2] for gmm in gmms), default=0)
    o.require("plans", _components(pair) == (size, size), f"must be between mixtures of {size} components")
    if o.held("edges") is not None:
        _nodes(o, "edges", len(gmms))
    _names(o, len(gmms))


def _names(o: _Object, n_nodes: int) -> None:
    names = o.held("names")
    if names is not None:
        o.require("names", len(set(names)) == len(names) == n_nodes, f"must be {n_nodes} that differ")


def _nodes(o: _Object, name: str, n_nodes: int) -> None:
    index = o.array(name)
    o.require(name, (index >= 0) & (index < n_nodes), f"must be nodes, from 0 to {n_nodes - 1}")


def _graph(o: _Object) -> None:
    sizes, n_nodes = o.held("sizes"), o.sizes["V"]
    o.require("sizes", len(sizes) == n_nodes, f"has {len(sizes)} parts for {n_nodes} nodes")
    largest = o.held("nodes").means.shape[-2]
    o.require("sizes", [0 < size <= largest for size in sizes], f"must be from 1 to {largest}")
    for name in ("sources", "targets"):
        _nodes(o, name, n_nodes)
    _names(o, n_nodes)
    o.require("targets", o.array("sources") != o.array("targets"), "must be other nodes than the sources")
    if o.held("links") is not None:
        shape = np.shape(o.held("links"))[-2:]
        o.require("links", shape == (largest, largest), f"must be of {largest} components on either side")


def _graph_values(o: _Object) -> None:
    _prices(o, o.held("balanced"))
    for name in ("edge_weights", "node_weights"):
        o.require(name, np.isfinite(o.array(name)) & (o.array(name) >= 0), "must be finite and at least 0")
    _finite_values("times")(o)


def _classes(o: _Object) -> None:
    index, k = o.array("of_component"), o.held("gmm").means.shape[-2]
    o.require("of_component", index.shape[-1] == k, f"is of {index.shape[-1]} components, and gmm has {k}")
    o.require("of_component", (index >= 0) & (index < len(o.held("names"))), "names a class that there is not")


def _finite_values(*names: str) -> Callable[[_Object], None]:
    def values(o: _Object) -> None:
        for name in names:
            if o.held(name) is not None:
                said = ", or the status say that it is not" if hasattr(o.value, "status") else ""
                o.require(name, np.isfinite(o.array(name)), f"must be finite{said}")

    return values


def _flow(o: _Object) -> None:
    o.require("path", o.held("path").means.shape[-2:] == o.held("gmm").means.shape[-2:], "has mixtures of another size")


def _fidelity_values(fidelity: _Object) -> None:
    for name in ("loss", "mean_shift", "covariance_shift"):
        value = fidelity.array(name)
        fidelity.require(name, np.isnan(value) | ((value >= 0) & np.isfinite(value)), "must be finite and at least 0")


_RELATIONS: dict[str, Callable[[_Object], None]] = {
    "BarycenterFit": _steps,
    "Classes": _classes,
    "FlowFit": _flow,
    "GaussianMixture": _mixture_sizes,
    "GaussianMixturePair": _pair_sizes,
    "GraphFit": _graph_fit,
    "MixtureFit": _mixture_fit,
    "MixtureFits": _stacked_fits(lambda fit: [fit.gmm]),
    "MixtureGraph": _graph,
    "PairFit": _pair_fit,
    "PairFits": _stacked_fits(lambda fit: [fit.pair.gmm0, fit.pair.gmm1]),
    "Plan": _plan_sizes,
}
_VALUES: dict[str, Callable[[_Object], None]] = {
    "BarycenterFit": _finite_values("objective"),
    "Fidelity": _fidelity_values,
    "FlowFit": _finite_values("loss"),
    "GaussianMixture": _mixture_values,
    "GaussianMixturePair": _pair_values,
    "GraphFit": _finite_values("penalized_log_likelihood", "times"),
    "MixtureFit": _finite_values("log_likelihood", "penalized_log_likelihood"),
    "MixtureGraph": _graph_values,
    "MixtureStatistics": _statistics_values,
    "PairFit": _finite_values("penalized_log_likelihood"),
    "Plan": _plan_values,
}
