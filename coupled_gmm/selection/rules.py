"""Which row of a table of fits is chosen, by how likely what was held out is under each."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

RULES = ("one_standard_error", "best", "corner")


class Candidates(NamedTuple):
    """Rows of a table: what they were fitted with, and how they did."""

    sizes: Int[np.ndarray, " R"]  # components, at most, of a mixture
    groups: Int[np.ndarray, " R"]  # rows that differ in their weight alone have one number
    weights: Float[np.ndarray, " R"]
    scores: Float[np.ndarray, "R F"]  # of each fold; -inf where a fit has failed
    errors: Float[np.ndarray, " R"]  # standard errors of their means
    lost: Float[np.ndarray, " R"]  # what coupling has cost, of the cloud that has lost most
    dear: Bool[np.ndarray, " R"]  # it has cost a cloud more than chance costs fits apart
    log_likelihoods: Float[np.ndarray, " R"]  # of all points, fitted to all
    transport: Float[np.ndarray, " R"]

    def means(self) -> Float[np.ndarray, " R"]:
        return self.scores.mean(axis=1)

    def losses(self) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, " R"]]:
        r"""How much less likely each is than the best, and how sure that is, the standard error over folds F:

        .. math:: \bar d, \quad \mathrm{sd}(d_f) / \sqrt F, \quad d_f = s_{best, f} - s_f

        Folds are paired: what is hard for all costs none. Infinite where a fit has failed.
        """
        failed = np.any(~np.isfinite(self.scores), axis=1)
        best = int(np.argmax(self.means()))
        behind = self.scores[best] - np.where(failed[:, None], 0, self.scores)
        error = behind.std(axis=1, ddof=1) / np.sqrt(behind.shape[1])
        return np.where(failed, np.inf, behind.mean(axis=1)), np.where(failed, np.inf, error)

    def within(self) -> Bool[np.ndarray, " R"]:
        """The best row, and those that lose no more than its standard error and in which coupling is not dear."""
        loss, _ = self.losses()
        best = int(np.argmax(self.means()))
        near = np.isfinite(loss) & (loss <= self.errors[best]) & ~self.dear
        return near | (np.arange(len(loss)) == best)


def chosen(candidates: Candidates, rule: str) -> int:
    """The number of the row that a rule takes.

    "best": the likeliest. "one_standard_error": of those within its standard error (Breiman et al. 1984) the smallest mixtures, and
    of these the strongest coupling: for each epsilon and rho the largest weight, and of those the one that costs most. A large
    weight is weak where mass may change for little, and so is a large rho at a small weight. "corner": of the same mixtures,
    epsilon and rho the weight at which log-likelihood against transport turns: farthest above the line between the path's ends.
    """
    means, within = candidates.means(), candidates.within()
    if rule == "best":
        return int(np.argmax(means))
    smallest = within & (candidates.sizes == np.min(candidates.sizes, where=within, initial=candidates.sizes.max()))
    coupled = smallest & (candidates.weights > 0)  # at weight 0 prices are all the same
    if coupled.any():
        every = np.unique(candidates.groups[coupled])
        groups = [np.flatnonzero(coupled & (candidates.groups == group)) for group in every]
        strongest = np.array([rows[np.argmax(candidates.weights[rows])] for rows in groups])
        row = int(strongest[np.argmax(candidates.lost[strongest])])
    else:
        row = int(np.argmax(np.where(smallest, means, -np.inf)))
    if rule == "one_standard_error":
        return row
    rows = np.flatnonzero((candidates.groups == candidates.groups[row]) & np.isfinite(means))
    return int(rows[corner(candidates.transport[rows], candidates.log_likelihoods[rows])])


def corner(transport: Float[np.ndarray, " n"], likelihood: Float[np.ndarray, " n"]) -> int:
    """Of a path the point farthest above the line between its ends, both axes being parts of their ranges."""

    def part(values: np.ndarray) -> np.ndarray:
        size = np.ptp(values)
        return (values - values.min()) / (size if size > 0 else 1)

    return int(np.argmax(part(likelihood) - part(transport)))
