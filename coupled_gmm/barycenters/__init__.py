"""One free mixture, pulled by fixed ones: F(p) = sum_b c_b T(p, q_b).

The mixture in the middle of others? `barycenter`. With fewer components? `reduction`. One becoming another? `flow`. What
all three descend, and the plans to the fixed mixtures? `problem`.
"""
