"""The job `fit` of a configuration with a section [graph]: mixtures fitted to several clouds, neighbours close to one another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import polars as pl
from pydantic import BeforeValidator, model_validator
from rich.console import Console

import coupled_gmm as cg
from coupled_gmm.core.checks import brief
from coupled_gmm.core.progress import ProgressBar
from coupled_gmm.core.tree import listed
from coupled_gmm.jobs.clouds import described
from coupled_gmm.jobs.config import JobConfig
from coupled_gmm.jobs.coupled import CoupledFit, FitOutput, Start, fidelity_sheet, pooled_start
from coupled_gmm.jobs.job import Job
from coupled_gmm.jobs.nodes import Graph, NodeClouds, NodeData, read_nodes
from coupled_gmm.jobs.sections import blame, refuse
from coupled_gmm.jobs.tables import MOST_ROWS, Sheet, history_table, quantities
from coupled_gmm.jobs.terminal import say

# Arguments whose key has another name, or stands in another section.
KEYS = {"x": "data", "clouds": "data.clouds", "point_weights": "data.weights", "ridge": "fit.ridge"}
KEYS |= {"init": "fit.ridge", "gmm": "fit.ridge", "times": "graph.times", "names": "graph.names"}
KEYS |= {"frozen": "graph.frozen", "edge_weights": "fit.transport_weight"}
_LARGEST = 2**31 - 1


def _sizes(given: Any) -> int | list[int]:
    several = given if isinstance(given, list) else [given]
    for one in several:
        if isinstance(one, bool) or not isinstance(one, int):
            raise refuse(f"must be a valid integer, or a list of one for each node, got {brief(one)}")
        if not 1 <= one <= _LARGEST:
            raise refuse(f"must be greater than or equal to 1 and less than {_LARGEST + 1}, got {brief(one)}")
    return given


class NodeStart(Start):
    """The same for mixtures of several sizes: a pooled fit for each."""

    n_components: Annotated[int | list[int], BeforeValidator(_sizes)]  # pyright: ignore[reportIncompatibleVariableOverride]

    def sizes(self, n_nodes: int) -> list[int]:
        """Of the mixture of each node."""
        return self.n_components if isinstance(self.n_components, list) else [self.n_components] * n_nodes


class GraphConfig(JobConfig):
    command = "fit"
    data: NodeData
    graph: Graph
    start: NodeStart
    fit: CoupledFit
    output: FitOutput = FitOutput()

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        self.graph.check(self.data)
        n_nodes, sizes = self.graph.n_nodes(self.data.n_clouds), self.start.n_components
        if isinstance(sizes, list) and len(sizes) != n_nodes:
            raise refuse(
                f"must be one number, or one for each of the {n_nodes} nodes, got {len(sizes)}", "start.n_components"
            )
        return self

    @classmethod
    def claims(cls, values: Mapping[str, Any]) -> bool:
        return "graph" in values or has_several(values)

    def completed(self) -> Self:
        return self.model_copy(update={"data": self.data.completed(), "graph": self.graph.completed(self.data)})


def has_several(values: Mapping[str, Any]) -> bool:
    """Whether a configuration's [data] is that of a graph."""
    data = values.get("data")
    return isinstance(data, dict) and ("clouds" in data or data.get("source") == "time_course")


class GraphJob(Job[GraphConfig, NodeClouds, cg.GraphFit]):
    summary = "Fit mixtures to two clouds, or to a course of several, so that neighbours stay close."
    config = GraphConfig
    result = cg.GraphFit
    files = ("history.csv", "masses.csv", "growth.csv", "plan.csv", "fidelity.csv")
    files += ("clouds.png", "mass_flow.png", "objective.png")
    measures = ("penalized_log_likelihood", "n_steps")

    def read(self, path: Path, config: GraphConfig) -> NodeClouds:
        return read_nodes(path, config.data, config.graph, config.precision)

    def solve(
        self, path: Path, config: GraphConfig, inputs: NodeClouds, console: Console
    ) -> tuple[GraphConfig, cg.GraphFit]:
        for note in inputs.notes:
            say(console, note)
        if inputs.names is not None:  # kept in the run's configuration, and shown by its pictures
            config = config.model_copy(update={"data": config.data.model_copy(update={"columns": list(inputs.names)})})
        say(console, described(inputs.given[0], config.precision))
        sizes = config.start.sizes(len(inputs.points))
        with console.status("fitting the start"), blame(path, "start", NodeStart, KEYS):
            pooled = {
                size: pooled_start(config.start, size, config.fit.ridge, *inputs.given) for size in sorted(set(sizes))
            }
        said = listed(f"{size} ({int(fit.n_steps)} EM steps)" for size, fit in pooled.items())
        say(console, f"start: for all clouds one mixture of {said} components")
        section = config.fit
        with blame(path, "fit", CoupledFit, KEYS):
            weight = 1.0 if section.transport_weight is None else section.transport_weight
            gmms = [pooled[size].gmm for size in sizes]
            graph = config.graph.build(gmms, edge_weights=weight, **section.prices((1, 2)))
            with ProgressBar(console) as bar:
                result = cg.fit_graph(
                    inputs.points,
                    graph,
                    point_weights=inputs.weights,
                    progress=None if console.quiet else bar,
                    **section.options(),
                )
        return config, result

    def tables(self, result: cg.GraphFit) -> dict[str, pl.DataFrame]:
        history, steps = result.history, int(result.n_steps)
        names = ("transport", "objective", "penalized_log_likelihood", "marginal_error")
        q = np.asarray(history.q)
        columns = {f"q_{i}": q[:, i] for i in np.flatnonzero(np.nan_to_num(q).any(axis=0))}  # of nodes with a cloud
        columns |= {name: np.asarray(getattr(history, name)) for name in names}
        return {
            "history.csv": history_table({name: column[:steps] for name, column in columns.items()}),
            "masses.csv": _masses(result),
            "growth.csv": _growth(result),
            "plan.csv": _plan(result),
            "fidelity.csv": _fidelity(result),
        }

    def sheets(self, result: cg.GraphFit) -> Sequence[Sheet]:
        return (
            _mass_sheet(result),
            _growth_sheet(result),
            *fidelity_sheet(result.fidelity, called(result)),
            _costs(result),
        )

    def drawn(self, result: cg.GraphFit) -> Any:
        return result.gmms

    def figures(self, config: GraphConfig, result: cg.GraphFit, inputs: NodeClouds) -> dict[str, Any]:
        from coupled_gmm.plot import courses, fits

        options = {"max_points": config.output.max_points_drawn, "feature_names": config.data.columns}
        figures = {
            "clouds.png": courses.plot_nodes(result, inputs.points, **options),
            "objective.png": fits.plot_history(result),
        }
        if config.graph.kind == "chain":
            figures["mass_flow.png"] = courses.plot_mass_flow(result)
        return figures


def called(fit: cg.GraphFit) -> list[str]:
    """What to call each node: its name, or its number; and its time."""
    names = [f"node {i}" for i in range(len(fit.gmms))] if fit.names is None else list(fit.names)
    if fit.times is None:
        return names
    return [f"{name}, t {time:g}" for name, time in zip(names, np.asarray(fit.times).tolist(), strict=True)]


def _identified(fit: cg.GraphFit, nodes: np.ndarray, prefix: str = "") -> dict[str, Any]:
    """Columns that say which node a row is of."""
    columns: dict[str, Any] = {f"{prefix}node": nodes}
    if fit.names is not None:
        columns[f"{prefix}name"] = [fit.names[i] for i in nodes]
    if fit.times is not None:
        columns[f"{prefix}time"] = np.asarray(fit.times)[nodes]
    return columns


def _masses(fit: cg.GraphFit) -> pl.DataFrame:
    """One row per node and component."""
    nodes = np.repeat(np.arange(len(fit.gmms)), [gmm.n_components for gmm in fit.gmms])
    components = np.concatenate([np.arange(gmm.n_components) for gmm in fit.gmms])
    means = np.concatenate([np.asarray(gmm.means) for gmm in fit.gmms])
    masses = np.concatenate([np.asarray(gmm.weights) for gmm in fit.gmms])
    columns = {"component": components, "mass": masses, **{f"mean_{i}": mean for i, mean in enumerate(means.T)}}
    return pl.DataFrame(_identified(fit, nodes) | columns)


def _growth(fit: cg.GraphFit) -> pl.DataFrame:
    """One row per edge and component of its earlier node."""
    found = fit.growth()
    counts = [len(growth.change) for growth in found]
    sources, targets = (np.repeat([getattr(g, end) for g in found], counts) for end in ("source", "target"))
    columns = {"component": np.concatenate([np.arange(count) for count in counts])}
    columns["change"] = np.concatenate([np.asarray(growth.change) for growth in found])
    rates = [growth.rate for growth in found]
    if all(rate is not None for rate in rates):
        columns["rate"] = np.concatenate([np.asarray(rate) for rate in rates])
    return pl.DataFrame(_identified(fit, sources, "from_") | _identified(fit, targets, "to_") | columns)


def _plan(fit: cg.GraphFit) -> pl.DataFrame:
    """One row per edge, component of its one node and component of its other."""
    rows = []
    for edge, (i, j) in enumerate(np.asarray(fit.edges).tolist()):
        matrix = np.asarray(fit.plan(edge).matrix)
        k, m = (index.ravel() for index in np.indices(matrix.shape))
        ends = np.full(len(k), i), np.full(len(k), j)
        rows.append(
            pl.DataFrame(
                _identified(fit, ends[0], "from_")
                | {"from_component": k}
                | _identified(fit, ends[1], "to_")
                | {"to_component": m, "mass": matrix.ravel()}
            )
        )
    return pl.concat(rows)


def _fidelity(fit: cg.GraphFit) -> pl.DataFrame:
    """One row per node."""
    columns = _identified(fit, np.arange(len(fit.gmms)))
    if fit.fidelity is not None:
        names = ("log_likelihood", "loss", "mean_shift", "covariance_shift")
        columns |= {name: np.asarray(getattr(fit.fidelity, name)) for name in names}
    return pl.DataFrame(columns, nan_to_null=True)


def _mass_sheet(fit: cg.GraphFit) -> Sheet:
    """A row per node, a column per component."""
    columns = {"": called(fit)}
    for k in range(min(max(gmm.n_components for gmm in fit.gmms), MOST_ROWS)):
        columns[f"mass {k}"] = [f"{float(gmm.weights[k]):.4f}" if k < gmm.n_components else "" for gmm in fit.gmms]
    return Sheet("Masses of components (all are in masses.csv)", columns)


def _growth_sheet(fit: cg.GraphFit) -> Sheet:
    """A row per edge: what the mass of each component of its earlier node changes by."""
    found, named = fit.growth(), called(fit)
    columns = {"": [f"{named[growth.source]} to {named[growth.target]}" for growth in found]}
    for k in range(min(max(len(growth.change) for growth in found), MOST_ROWS)):
        columns[f"from {k}"] = [f"{float(growth.change[k]):.4f}" if k < len(growth.change) else "" for growth in found]
    return Sheet("Factors by which masses change on their way (rates are in growth.csv)", columns)


def _costs(fit: cg.GraphFit) -> Sheet:
    plans, weights = fit.plans, np.asarray(fit.edge_weights)

    def ranged(values: Any) -> str:
        low, high = np.min(values), np.max(values)
        return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"

    relative = "" if fit.relative_weights is None else f", {ranged(fit.relative_weights)}"
    rows = {
        "edges": str(len(weights)),
        "transport weight, relative weight": ranged(weights) + relative,
        "epsilon": ranged(plans.pair.epsilon),
        "rho": "infinite (balanced)" if plans.pair.balanced else ranged(plans.pair.rho),
        "transport cost <P, C>, summed": f"{float(np.sum(plans.transport_cost)):.6f}",
        "marginal error, largest": f"{float(np.max(plans.marginal_error)):.1e}",
        "penalised log-likelihood": f"{float(fit.penalized_log_likelihood):.6f}",
        "EM steps": str(int(fit.n_steps)),
    }
    return quantities("Costs", rows)
