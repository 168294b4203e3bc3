"""Plans between two mixtures, and what they do to points and mixtures.

With C the costs of components, a and b their masses, eps the regularisation and rho the prices of mass (infinite: balanced),

    min over P >= 0 of  <P, C> + eps KL(P | a b^T) + rho0 KL(P 1 | a) + rho1 KL(P^T 1 | b),    P = a b^T exp((f + g - C) / eps).

What is the problem, the plan of given potentials, a marginal error, the rho of a tau? `problem`; between two mixtures? `pair`.
Which method solves it, and what is the distance MW2? `solvers`; by OTT? `sinkhorn`; in how many iterations, how precisely?
`limits`. Derivatives of values and potentials? `duals`. Which equations has an entropic plan? `entropic`; with masses that move
as well? `masses`, whose Newton step is in `edges`. How are they solved, and why did this plan not converge? `annealing`.
Vertices of the linear programme (eps = 0)? `exact`; many components, by POT? `network_simplex`. Which components may exchange
mass, and can they carry it? `links`. What is a plan, and how is it certified? `plan`, by its `marginals`. Several plans on end?
`composition`. Where do points go? `maps`.
"""
