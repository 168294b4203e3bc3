"""Pictures, and no mathematics: imported where they are drawn, since matplotlib is slow to import.

Mixtures, plans and coupled fits? `mixtures`. Barycenters and flows? `flow`.
"""
