r"""Smooth paths through the mixtures of a fitted chain: of points, and of the mixtures themselves.

A chain of plans is a Markov chain of components :math:`Z_0, Z_1, \dots`, each reached from the last by a Gaussian map, and so a
law of points seen at all nodes: :math:`X_v = m_{Z_v} + A_v \xi`, with one standard normal :math:`\xi` for all times. A cubic spline
through them is linear in what it goes through, with weights of the time alone,

.. math:: X(t) = \sum_v W_v(t) X_v .

What are the weights, and what is asked at the ends? `splines`. Which nodes are a chain, and what are its plans? `chains`. Where are
points at any time? `points`: a spline goes through their images under the chained maps. Where is the mixture? `densities`: it has a
component for each pair that the plan around t joins, with the mean and covariance of :math:`X(t)` given that pair.
`method="geodesic"` has the weights of straight lines, and nothing else changes.
"""
