"""Gaussians and mixtures of them, p = sum_k w_k N(m_k, S_k), and the Bures geometry of their components.

Factors L_k of S_k = L_k L_k^T and log-weights are what programs carry. The squared Bures-Wasserstein distance of two components is

    |m - m'|^2 + tr S + tr S' - 2 tr (S^1/2 S' S^1/2)^1/2,   the last term twice the nuclear norm of L^T L'.

What is a mixture? `mixture`. Where is its density computed? `density`; at the points of a cloud, in memory or not? `at_points`.
Given some features? `conditional`. The distance of two Gaussians? `bures`; for OTT's solvers? `ott_cost`. When is a covariance
indefinite, or singular? `covariances`.
"""
