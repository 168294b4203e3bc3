"""Graphs of clouds that a configuration names: [data] with a file for each cloud, or a built-in time course, and [graph]."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import jax
import numpy as np
from jaxtyping import Array
from pydantic import BeforeValidator, Field, model_validator

import coupled_gmm as cg
from coupled_gmm.core import checks
from coupled_gmm.core.tree import listed
from coupled_gmm.data import clouds
from coupled_gmm.jobs.clouds import CloudFile, CloudKeys, PointCount, Weights, read_cloud
from coupled_gmm.jobs.config import Seed
from coupled_gmm.jobs.sections import ConfigError, Section, blame, refuse

TIME_COURSE_SIZE = 1_000
CENTRE = "centre"  # of a star
_TIMES = list(clouds.COURSE_TIMES)


def _several(given: Any) -> Any:
    """One word as a list of one."""
    return [given] if isinstance(given, str) else given


def _node(given: Any) -> Any:
    if isinstance(given, bool) or not isinstance(given, (int, str)):
        raise refuse(f"must be a node's name, or its number from 0, got {checks.brief(given)}")
    return given


Node = Annotated[int | str, BeforeValidator(_node)]


class NodeData(Section):
    """A built-in time course, or a file for each cloud."""

    source: Literal["time_course"] | None = None
    n: PointCount | None = None  # points in each cloud of the built-in source
    seed: Seed | None = None
    clouds: Annotated[list[CloudFile], Field(min_length=2)] | None = None
    columns: Annotated[list[str], Field(min_length=1)] | None = (
        None  # of tables, the features; None: all, paired by name
    )
    header: bool | None = None  # of text, whether the first line holds names; None: told from the file, or refused
    keys: Annotated[list[str], BeforeValidator(_several)] | None = (
        None  # arrays of .npz files: one for all, or one each
    )
    weights: Annotated[list[Weights], BeforeValidator(_several)] | None = None  # as of a pair: one for all, or one each

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.source is None:
            if self.clouds is None:
                raise refuse("missing; name a file for each, or set source to 'time_course'", "clouds")
            for key in ("n", "seed"):
                if getattr(self, key) is not None:
                    raise refuse("is for the built-in source; remove it, or set source", key)
            for key in ("keys", "weights"):
                if getattr(self, key) is not None and len(getattr(self, key)) not in (1, len(self.clouds)):
                    problem = f"must be one for all, or one for each of the {len(self.clouds)} clouds"
                    raise refuse(f"{problem}, got {len(getattr(self, key))}", key)
            return self
        for key in ("clouds", "columns", "header", "keys", "weights"):
            if getattr(self, key) is not None:
                raise refuse(f"is for clouds from files; remove it, or remove source = {self.source!r}", key)
        return self

    @property
    def n_clouds(self) -> int:
        return len(_TIMES if self.clouds is None else self.clouds)

    def completed(self) -> Self:
        """With the defaults of the built-in source written out."""
        if self.source is None:
            return self
        return self.model_copy(update={"n": self.n or TIME_COURSE_SIZE, "seed": self.seed or 0})


class Graph(Section):
    """Which clouds are neighbours: a chain in time, or a star whose centre has no cloud."""

    kind: Literal["chain", "star"] = "chain"
    times: list[float] | None = None
    names: list[str] | None = None
    frozen: list[Node] = Field(default=[])

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        times, names = self.times, self.names
        if times is not None and self.kind == "star":
            raise refuse("a star has none; remove it, or set kind = 'chain'", "times")
        if times is not None and not all(map(np.isfinite, times)):
            raise refuse(f"must be finite, got {checks.brief(times)}", "times")
        if times is not None and not all(a < b for a, b in pairwise(times)):
            raise refuse(f"must increase, got {checks.brief(times)}; name clouds and times in their order", "times")
        if names is not None and (len(set(names)) < len(names) or "" in names):
            raise refuse("must be words, all different; give each cloud its own", "names")
        if names is not None and self.kind == "star" and CENTRE in names:
            raise refuse(f"{CENTRE!r} is what the middle of a star is called; name the cloud otherwise", "names")
        return self

    def check(self, data: NodeData) -> None:
        """Against the number of clouds; keys are those of the whole configuration."""
        n = data.n_clouds
        for key in ("times", "names"):
            given = getattr(self, key)
            if given is not None and len(given) != n:
                raise refuse(f"must be one for each of the {n} clouds, got {len(given)}", f"graph.{key}")
        called = self.called
        for i, node in enumerate(self.frozen):
            known = node in (called or ()) if isinstance(node, str) else 0 <= node < self.n_nodes(n)
            if not known:
                last = f"numbers are 0 to {self.n_nodes(n) - 1}" + (f", names {listed(called)}" if called else "")
                raise refuse(f"there is no node {node!r}; {last}", f"graph.frozen.{i}")

    def n_nodes(self, n_clouds: int) -> int:
        return n_clouds + (self.kind == "star")

    @property
    def called(self) -> list[str] | None:
        """Names of the nodes, where clouds have some."""
        if self.names is None or self.kind == "chain":
            return self.names
        return [CENTRE, *self.names]

    def completed(self, data: NodeData) -> Self:
        """With the times of a chain written out."""
        if self.kind == "star" or self.times is not None:
            return self
        times = _TIMES if data.source is not None else [float(t) for t in range(data.n_clouds)]
        return self.model_copy(update={"times": times})

    def build(self, gmms: Sequence[cg.GaussianMixture], **options: Any) -> cg.MixtureGraph:
        """Of one mixture for each node."""
        options = {**options, "frozen": self.frozen, "names": self.called}
        if self.kind == "star":
            return cg.star(gmms[0], gmms[1:], **options)
        return cg.chain(gmms, times=self.times, **options)


class NodeClouds(NamedTuple):
    """The clouds of a graph's nodes, None where a node has none, and what was read beside their points."""

    points: list[np.ndarray | Array | None]
    weights: list[np.ndarray | None]
    names: tuple[str, ...] | None = None  # of the features
    notes: Sequence[str] = ()

    @property
    def given(self) -> tuple[list[np.ndarray | Array], list[np.ndarray | None]]:
        """Points and weights of those that there are."""
        both = [(x, w) for x, w in zip(self.points, self.weights, strict=True) if x is not None]
        return [x for x, _ in both], [w for _, w in both]


def read_nodes(path: Path, data: NodeData, graph: Graph, precision: str) -> NodeClouds:
    """The clouds of [data] at the nodes of [graph], as `read_pair` reads two.

    Raises:
      ConfigError: a file can't be read or used, or the clouds do not have the same features.
    """
    centre = [None] * (graph.kind == "star")
    if data.source is not None:
        points, _ = clouds.time_course_clouds(jax.random.key(data.seed or 0), data.n or TIME_COURSE_SIZE)
        return NodeClouds([*centre, *points], [None] * (len(centre) + len(points)))
    read = [read_cloud(path, one, data.columns, data.header, precision) for one in _each(data)]
    found, weights = [cloud for cloud, _ in read], [w for _, w in read]
    first, notes = found[0], [f"clouds.{i}: {note}" for i, cloud in enumerate(found) for note in cloud.notes]
    named = first.names is not None
    for i, cloud in enumerate(found[1:], 1):
        with blame(path, "data", NodeData):
            _, found[i] = clouds.paired(("clouds[0]", f"clouds[{i}]"), first, cloud)
        (d, e), names = (first.points.shape[1], cloud.points.shape[1]), found[i].names
        if d != e:
            raise ConfigError(
                f"{path}: data.clouds.{i}: has {e} features and clouds.0 has {d}; choose the same ones with columns"
            )
        if names != cloud.names:
            notes.append(f"clouds.{i}: columns put into the order of clouds.0, {', '.join(first.names or ())}")
        named = named and names is not None
    points = [*centre, *(cloud.points for cloud in found)]
    return NodeClouds(points, [*centre, *weights], first.names if named else None, notes)


def _each(data: NodeData) -> list[CloudKeys]:
    files, n = data.clouds or [], data.n_clouds

    def one_each(given: list[str] | None) -> Sequence[str | None]:
        return [None] * n if given is None else [*given] * (n // len(given))

    keys, weights = one_each(data.keys), one_each(data.weights)
    places = [f"weights.{i}" if data.weights and len(data.weights) > 1 else "weights" for i in range(n)]
    return [CloudKeys(f"clouds.{i}", *each) for i, each in enumerate(zip(places, files, weights, keys, strict=True))]
