r"""Which answer to trust: how many components, how dear transport, and how sure the fit is then.

.. math:: s_f = \sum_i v_i \, \overline{\log p_i^{(-f)}(x)} \text{ over fold f}, \qquad
   \omega_i = w_i e_i \big/ \textstyle\sum_j w_j e_j

What is chosen, and by what? `choose`, which returns a `choice`. What is compared? `grid`. What is held out? `folds`. How are fits
along weights made and scored? `paths`. What does each cloud say? `criteria`. Which row of the table is taken? `rules`. How
sure is a fit? `bootstrap`, by `replicates`: the same fit under random weights of its points.
"""
