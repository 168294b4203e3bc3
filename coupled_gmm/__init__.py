"""Gaussian mixtures, fitted together and transported onto each other."""

from typing import TYPE_CHECKING, Any

from coupled_gmm.core import installation, interrupts

if interrupts.is_command():
    interrupts.watch()  # Ctrl-C may end it while the rest is imported
    installation.check_command()

from coupled_gmm.barycenters.barycenter import BarycenterFit, barycenter
from coupled_gmm.barycenters.flow import FlowFit, flow
from coupled_gmm.barycenters.reduction import reduce_gmm
from coupled_gmm.batch.classes import Classes, fit_classes
from coupled_gmm.batch.distances import mw2_matrix
from coupled_gmm.batch.mixtures import MixtureFits, fit_gmms, init_gmms
from coupled_gmm.batch.pairs import PairFits, fit_pairs
from coupled_gmm.core.status import FitError, Status
from coupled_gmm.courses.densities import mixture_at
from coupled_gmm.courses.points import trajectories
from coupled_gmm.data.opening import open_cloud
from coupled_gmm.data.placement import shard_cloud
from coupled_gmm.data.saving import load, save
from coupled_gmm.fits.contest import StartEnds
from coupled_gmm.fits.coupled import GraphFit, fit_graph
from coupled_gmm.fits.fidelity import Fidelity
from coupled_gmm.fits.gmm import MixtureFit, fit_gmm, init_gmm
from coupled_gmm.fits.graph import MixtureGraph
from coupled_gmm.fits.graphs import chain, grid, star
from coupled_gmm.fits.online import MixtureStatistics
from coupled_gmm.fits.pairs import PairFit, fit_pair, fit_path
from coupled_gmm.fits.penalized import penalized_log_likelihood
from coupled_gmm.gaussians.bures import bures_cost_matrix
from coupled_gmm.gaussians.mixture import GaussianMixture
from coupled_gmm.interop.convert import from_ott, from_sklearn, to_ott, to_pot, to_sklearn
from coupled_gmm.selection.bootstrap import Bootstrap, Intervals, bootstrap
from coupled_gmm.selection.choice import Choice
from coupled_gmm.selection.choose import choose
from coupled_gmm.transport.links import links
from coupled_gmm.transport.maps import interpolate, map_points, plan_density
from coupled_gmm.transport.pair import GaussianMixturePair
from coupled_gmm.transport.plan import CostParts, Plan
from coupled_gmm.transport.solvers import mw2_squared, solve_plan

if TYPE_CHECKING:
    from coupled_gmm.gaussians.ott_cost import BuresCost

    __version__: str

__all__ = [
    "BarycenterFit",
    "Bootstrap",
    "BuresCost",
    "Choice",
    "Classes",
    "CostParts",
    "Fidelity",
    "FitError",
    "FlowFit",
    "GaussianMixture",
    "GaussianMixturePair",
    "GraphFit",
    "Intervals",
    "MixtureFit",
    "MixtureFits",
    "MixtureGraph",
    "MixtureStatistics",
    "PairFit",
    "PairFits",
    "Plan",
    "StartEnds",
    "Status",
    "barycenter",
    "bootstrap",
    "bures_cost_matrix",
    "chain",
    "choose",
    "fit_classes",
    "fit_gmm",
    "fit_gmms",
    "fit_graph",
    "fit_pair",
    "fit_pairs",
    "fit_path",
    "flow",
    "from_ott",
    "from_sklearn",
    "grid",
    "init_gmm",
    "init_gmms",
    "interpolate",
    "links",
    "load",
    "map_points",
    "mixture_at",
    "mw2_matrix",
    "mw2_squared",
    "open_cloud",
    "penalized_log_likelihood",
    "plan_density",
    "reduce_gmm",
    "save",
    "shard_cloud",
    "solve_plan",
    "star",
    "to_ott",
    "to_pot",
    "to_sklearn",
    "trajectories",
]


def __getattr__(name: str) -> Any:
    if name == "BuresCost":  # OTT takes a second to import, and matplotlib comes with it
        from coupled_gmm.gaussians.ott_cost import BuresCost

        return BuresCost
    if name == "__version__":
        return installation.version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
