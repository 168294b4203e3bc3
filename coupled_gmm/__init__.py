"""Gaussian mixtures, fitted together and transported onto each other."""

from coupled_gmm.bures import BuresCost, bures_cost_matrix
from coupled_gmm.coupled import GraphFit, PairFit, fit_graph, fit_pair, penalized_log_likelihood
from coupled_gmm.graph import MixtureGraph
from coupled_gmm.mixture import GaussianMixture
from coupled_gmm.pair import GaussianMixturePair
from coupled_gmm.plan import Plan, solve_plan
from coupled_gmm.result import FitError, Status
