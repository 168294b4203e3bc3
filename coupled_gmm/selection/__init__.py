"""Which answer to trust: how many components and how dear transport shall be, and how sure the fit is then.

How sure is a fit? `bootstrap`, by `replicates`: the same fit under random weights of its points.
"""
