"""What `choose` returns: a table of fits, the row that was chosen, and the fit of that to all points."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from coupled_gmm.core.status import Outcome
from coupled_gmm.core.tree import AnyArray, number, pytree, saved, static
from coupled_gmm.fits.results import GraphFit, PairFit
from coupled_gmm.selection.rules import Candidates


@saved
@pytree
class Choice(Outcome):
    """The chosen fit, and how all that were compared did: a row for each number of components, epsilon, rho and weight.

    Scores are sums over clouds of the mean log-density of held out points, as J weighs them; a row of a fit that failed has minus
    infinity. Log-likelihoods, the same sums, and transport are those of the fit to all points.
    """

    fit: PairFit | GraphFit
    n_components: Int[AnyArray, " R"]  # of the largest mixture
    relative_weights: Float[AnyArray, " R"]
    transport_weights: Float[AnyArray, " R"]
    epsilons: Float[AnyArray, " R"]  # squared data units, mean over edges
    rhos: Float[AnyArray, " R"]
    scores: Float[AnyArray, "R F"]  # of each fold
    standard_errors: Float[AnyArray, " R"]  # of their means, as points are drawn at random
    lost: Float[AnyArray, " R"]  # nats per held-out point of the cloud that coupling has cost most
    dear: Bool[AnyArray, " R"]  # whether coupling has cost a cloud more than chance costs fits apart
    log_likelihoods: Float[AnyArray, " R"]
    transport: Float[AnyArray, " R"]
    bic: Float[AnyArray, " R"]  # of the mixtures alone, fitted apart: the sum over clouds
    aic: Float[AnyArray, " R"]
    n_failed: Int[AnyArray, " R"]  # folds whose fit has no usable result
    groups: Int[AnyArray, " R"]  # rows that differ in their weight alone have one number
    row: Int[AnyArray, ""]  # that was chosen
    rule: str = static()

    @property
    def status(self) -> Any:
        """Of the chosen fit."""
        return self.fit.status

    @property
    def candidates(self) -> Candidates:
        """The rows, as rules see them."""
        return Candidates(
            sizes=np.asarray(self.n_components),
            groups=np.asarray(self.groups),
            weights=np.asarray(self.relative_weights),
            scores=np.asarray(self.scores),
            errors=np.asarray(self.standard_errors),
            lost=np.asarray(self.lost),
            dear=np.asarray(self.dear),
            log_likelihoods=np.asarray(self.log_likelihoods),
            transport=np.asarray(self.transport),
        )

    @property
    def chosen(self) -> dict[str, Any]:
        """What the chosen fit was fitted with."""
        names = ("n_components", "relative_weight", "transport_weight", "epsilon", "rho")
        return {name: value for name, value in self.table[int(self.row)].items() if name in names}

    @property
    def table(self) -> list[dict[str, Any]]:
        """A dict for each row.

        `held_out` is the mean over folds, `standard_error` its own, as points are drawn at random; `loss` how much less likely the
        row is than the best, and `loss_error` how sure that is, by folds in pairs; `lost` what coupling has cost a cloud at most,
        and `dear` whether that is more than chance costs fits apart.
        """
        candidates = self.candidates
        loss, error = candidates.losses()
        columns = {
            "n_components": self.n_components,
            "relative_weight": self.relative_weights,
            "transport_weight": self.transport_weights,
            "epsilon": self.epsilons,
            "rho": self.rhos,
            "held_out": candidates.means(),
            "standard_error": self.standard_errors,
            "loss": loss,
            "loss_error": error,
            "lost": self.lost,
            "dear": self.dear,
            "log_likelihood": candidates.log_likelihoods,
            "transport": self.transport,
            "bic": self.bic,
            "aic": self.aic,
            "failed": self.n_failed,
            "chosen": np.arange(len(loss)) == int(self.row),
        }
        lists = {name: _as_given(np.asarray(column)) for name, column in columns.items()}
        return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]

    @property
    def message(self) -> str:
        """How the chosen fit ended; and whether a number that was chosen is the last that was offered."""
        said = [self.fit.message]
        row, weights, sizes = int(self.row), np.asarray(self.relative_weights), np.asarray(self.n_components)
        if len(set(sizes)) > 1 and sizes[row] == sizes.max():
            said.append(f"no more than {sizes.max()} components were offered, and as many were chosen: offer more")
        if len(set(weights)) > 1 and weights[row] == weights.max():
            said.append(f"no relative weight above {weights.max():g} was offered, and it was chosen: offer larger ones")
        return "; ".join(said)

    def _words(self) -> list[str]:
        row = self.chosen
        prices = f"epsilon {row['epsilon']:.4g}" + ("" if np.isinf(row["rho"]) else f", rho {row['rho']:.4g}")
        return [
            f"{row['n_components']} components",
            f"relative weight {row['relative_weight']:g}",
            prices,
            f"by {self.rule!r} of {len(self.groups)} rows",
        ]

    def _facts(self) -> dict[str, str]:
        row = self.table[int(self.row)]
        return {
            "held-out log-likelihood": f"{row['held_out']:.6g} +- {row['standard_error']:.2g}",
            "less than the best": f"{row['loss']:.3g} +- {row['loss_error']:.2g}",
            "transport weight": number(row["transport_weight"]),
            "BIC least at": f"{self._least('bic')} components",
            "AIC least at": f"{self._least('aic')} components",
            "rows with a failed fit": str(int((np.asarray(self.n_failed) > 0).sum())),
        }

    def _least(self, name: str) -> int:
        return int(np.asarray(self.n_components)[np.argmin(np.asarray(getattr(self, name)))])


def _as_given(column: np.ndarray) -> list:
    """Numbers in the digits that their precision has: 0.01, not 0.0099999998."""
    return [float(str(value)) for value in column] if column.dtype == np.float32 else column.tolist()
