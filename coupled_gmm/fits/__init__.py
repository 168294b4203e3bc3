"""Mixtures whose likelihood is raised by EM, alone or together on a graph.

    J = sum_i v_i mean log p_i(x_i) - sum_ij lambda_ij T(p_i, p_j)

is raised in two halves: the E-step reduces each cloud to masses, means and scatters under its mixture, the M-step climbs what these
say of J. One compiled loop serves the mixture alone (one node), the pair (one edge) and any graph.

How is one mixture fitted? `gmm`; and when more data come? `online`. A pair, from several starts, along a list of weights? `pairs`,
of which a `contest` keeps the best. Any graph? `coupled`. What may be asked of a fit? `request`. What happens in one EM step? `em`;
in its E-step? `statistics`; in its M-step? `minorants`: masses and plans at once, then means and factors under them, by the
`couplings` of the components that exchange mass; and in the last, where transport weighs most, one Gaussian for all: `merged`. With
an optimiser of the caller's? `m_step`, which evaluates `objective` itself, by one of the `optimisers`, in one of the `coordinates`.
What couples what? `graph`; which graphs are common? `graphs`; what are their nodes called? `nodes`; where links are forbidden, from
which masses can a fit start? `linked`. In what unit is the price of transport? `weights`. What has coupling cost? `fidelity`, by
`refits` without it. What is J itself? `penalized`. Where do fits start? `starts`. In which origin and unit do they see data?
`frame`; what is asked of clouds on several devices before? `shards`; of clouds that are not in memory? `external`, and in their
E-steps? `rows`. What do fits return? `results`, with a `history`. What do their plans say of nodes that no edge joins? `courses`,
along `routes` of edges; and of masses that change? `growth`.
"""
