"""OTT's coupled fit of its own tutorial: its samples, its start, its loop. What this project compares itself with."""

import contextlib
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ott.tools.gaussian_mixture import fit_gmm, fit_gmm_pair, gaussian_mixture, gaussian_mixture_pair

import coupled_gmm as cg

EPSILON, RHO = 0.01, 1.0
CASES = {"balanced": (0.01, 1.0), "unbalanced": (0.1, RHO / (RHO + EPSILON))}  # transport weight, tau


class Tutorial(NamedTuple):
    """OTT's clouds and the pooled mixture that its tutorial starts from."""

    x0: jax.Array
    x1: jax.Array
    pooled: gaussian_mixture.GaussianMixture

    @property
    def start(self) -> cg.GaussianMixture:
        return cg.GaussianMixture.from_moments(self.pooled.loc, self.pooled.covariance, self.pooled.component_weights)


def tutorial(n: int = 10_000) -> Tutorial:
    """The generating mixtures of the tutorial, drawn and pooled with OTT's own functions from PRNGKey(0)."""
    rng, rng0, rng1 = jax.random.split(jax.random.PRNGKey(0), 3)
    means = jnp.array([[2.0, -1.0], [-2.0, 0.0], [4.0, 3.0]])
    covariances = 3 * jnp.array([[[0.2, 0.0], [0.0, 0.1]], [[0.6, 0.0], [0.0, 0.3]], [[0.5, -0.4], [-0.4, 0.5]]])
    turned = jnp.stack([_turn(degrees) @ c for degrees, c in zip((5, -5, -10), covariances, strict=True)])
    shifts = jnp.array([[1.0, -0.5], [-1.0, -1.0], [-1.0, 0.0]])
    make = gaussian_mixture.GaussianMixture.from_mean_cov_component_weights
    x0 = make(mean=means, cov=covariances, component_weights=jnp.array([0.2, 0.2, 0.6])).sample(rng=rng0, size=n)
    x1 = make(mean=means + shifts, cov=turned, component_weights=jnp.array([0.4, 0.4, 0.2])).sample(rng=rng1, size=n)
    _, rng0 = jax.random.split(rng)
    points = jnp.concatenate([x0, x1])
    start = fit_gmm.initialize(rng=rng0, points=points, point_weights=None, n_components=3)
    return Tutorial(x0, x1, fit_gmm.fit_model_em(gmm=start, points=points, point_weights=None, steps=20))


def _turn(degrees: float) -> jax.Array:
    angle = np.deg2rad(degrees)
    return jnp.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def ott_fit(data: Tutorial, case: str, *, verbose: bool = False, em_steps: int = 30, m_steps: int = 20):
    """OTT's fit, as its tutorial calls it."""
    weight, tau = CASES[case]
    pair = gaussian_mixture_pair.GaussianMixturePair(data.pooled, data.pooled, epsilon=EPSILON, tau=tau)
    fit = fit_gmm_pair.get_fit_model_em_fn(weight_transport=weight, jit=True)
    return jax.block_until_ready(
        fit(pair, data.x0, data.x1, None, None, em_steps=em_steps, m_steps=m_steps, verbose=verbose)
    )


def ott_rows(data: Tutorial, case: str) -> np.ndarray:
    """The rows that OTT prints, (30, 5): step, q0, q1, transport, objective, to its three decimals."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ott_fit(data, case, verbose=True)
    lines = printed.getvalue().replace("transport:", "").replace("objective:", "").splitlines()
    return np.array([[float(word) for word in line.split()] for line in lines if line.strip()])


def our_fit(data: Tutorial, case: str, **options):
    """This project's fit of the same; the default optimiser unless told otherwise."""
    weight, tau = CASES[case]
    pair = cg.GaussianMixturePair(data.start, data.start, epsilon=EPSILON, tau=tau)
    return jax.block_until_ready(cg.fit_pair(data.x0, data.x1, pair, transport_weight=weight, **options))


if __name__ == "__main__":
    data = tutorial()
    for name in CASES:
        np.savetxt(f"tests/data/ott_{name}.csv", ott_rows(data, name), fmt="%g", delimiter=",")
