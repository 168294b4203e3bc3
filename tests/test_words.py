"""What objects and results say of themselves: short words, statuses by severity, remedies that exist."""

import importlib
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import points, random_mixture

import coupled_gmm as cg
from coupled_gmm.core import status
from coupled_gmm.core.status import Status
from coupled_gmm.core.tree import unchecked
from coupled_gmm.transport.plan import Plan

N, K, D = 60, 3, 2


@pytest.fixture(scope="module")
def objects():
    """One of every public class, by its name; the fit is of the program of `test_a_fit_whose_plan_stopped_short...`."""
    gmms = [random_mixture(seed, K, D, shift=3 * seed, condition=10) for seed in (0, 1)]
    clouds = [np.random.RandomState(seed).randn(N, D) for seed in (0, 1)]
    pair = cg.GaussianMixturePair(*gmms, 0.5, rho=2.0)
    fit = cg.fit_pair(*clouds, cg.GaussianMixturePair(*gmms, 0.5), transport_weight=0.1, em_steps=2, m_steps=2)
    graph = cg.MixtureGraph.from_mixtures([*gmms, gmms[0]], [(0, 1), (1, 2)], epsilon=0.5)
    stacked = cg.solve_plan(pair)
    history = fit.history
    graph_fit = unchecked(
        cg.GraphFit,
        gmms=[fit.pair.gmm0, fit.pair.gmm1],
        plans=jax.tree.map(lambda leaf: leaf[None], fit.plan),
        penalized_log_likelihood=fit.penalized_log_likelihood,
        status=fit.status,
        n_steps=fit.n_steps,
        history=history,
        log_likelihoods=fit.log_likelihoods,
        edges=jnp.array([[0, 1]]),
    )
    mixture_fit = cg.fit_gmm(clouds[0], gmms[0], max_steps=2, tol=0)
    barycenter = cg.barycenter(gmms, gmms[0], max_steps=1)
    flow = cg.flow(gmms[0], gmms[1], steps=1)
    found = [*gmms[:1], pair, fit, graph, stacked, graph_fit, mixture_fit, barycenter, flow, stacked.cost_parts]
    found += [history, mixture_fit.history, mixture_fit.statistics, barycenter.history, flow.history]
    return {type(one).__name__: one for one in found}


RESULTS = ("Plan", "PairFit", "GraphFit", "MixtureFit", "BarycenterFit", "FlowFit")


def test_a_repr_is_short(objects):
    said = {name: repr(one) for name, one in objects.items()}
    for name, text in said.items():
        assert text.startswith(f"{name}(") and text.endswith(")")
        assert len(text) < 400 and "Array(" not in text and "\n" not in text, text
    assert said["GaussianMixture"] == "GaussianMixture(3 components of 2 features, float32)"
    fit = objects["PairFit"]
    assert f"J {float(fit.penalized_log_likelihood):.6g}, 2 steps, steps done" in said["PairFit"]
    assert "3 nodes of 3, 3 and 3 components, 2 features, 2 edges, balanced" in said["MixtureGraph"]
    assert "rho 2" in said["GaussianMixturePair"] and "epsilon 0.5" in said["GaussianMixturePair"]
    assert f"<P, C> {float(objects['Plan'].transport_cost):.4g}"[:10] in said["Plan"]
    for name in RESULTS:
        assert objects[name].status_name in said[name]


def test_a_repr_of_several_says_how_many(objects):
    for name in ("GaussianMixture", "GaussianMixturePair", "Plan", "PairFit"):
        assert "3 stacked" in repr(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), objects[name]))
    assert "path" not in repr(objects["FlowFit"]) and "2 stacked" in repr(objects["FlowFit"].path)


def test_a_repr_never_raises(objects):
    """JAX puts tracers, shapes, placeholders and None into trees; arrays are of NumPy, deleted, of no element."""
    said = []

    def say(tree):
        said.append(repr(tree))
        return 0

    for one in objects.values():
        said.clear()
        jax.eval_shape(say, one)
        jax.vmap(say)(jax.tree.map(lambda leaf: leaf[None], one))
        structure = jax.tree.structure(one)
        for leaf in (object(), None, 0, 1.5, "x", np.float64(1), np.zeros(0), np.zeros((2, 3, 4, 5)), jnp.zeros(())):
            said.append(repr(jax.tree.unflatten(structure, [leaf] * structure.num_leaves)))
        said.append(repr(jax.eval_shape(lambda tree: tree, one)))
        said.append(repr(jax.tree.map(np.asarray, one)))
        copy = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), one)
        jax.tree.map(lambda leaf: leaf.delete(), copy)
        said.append(repr(copy))
        said.append(repr(unchecked(type(one))))
        assert all(text.startswith(type(one).__name__) and len(text) < 600 for text in said), said


def test_a_summary_is_a_few_lines(objects):
    for name in RESULTS:
        text = objects[name].summary()
        assert text.startswith(name) and 3 < len(text.splitlines()) < 12 and "Array(" not in text, text
        assert objects[name].message in text
    fit = objects["PairFit"]
    text = fit.summary()
    assert (
        f"J: {float(fit.penalized_log_likelihood):.6g}" in text and "EM steps: 2" in text and "plan: converged" in text
    )
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), fit)
    assert "2 stacked" in batch.summary() and "2 steps done" in batch.summary()


def test_severity_ranks_every_status_once():
    assert sorted(status.SEVERITY) == sorted(Status)
    assert [status.value for status in Status] == list(range(len(Status))), "files hold these numbers"


def test_a_batch_tells_its_worst_status_and_how_many_of_each():
    batch = jnp.array([Status.NOT_FINITE, Status.SINGULAR, Status.CONVERGED, Status.CONVERGED])
    assert status.worst(batch) is Status.NOT_FINITE
    assert status.status_name(batch) == "1 not finite, 1 singular, 2 converged"
    with pytest.raises(cg.FitError, match=r"not finite: .*\(of 4: 1 not finite, 1 singular, 2 converged\)"):
        status.raise_if_failed(batch)
    status.raise_if_failed(batch[2:])
    status.raise_if_failed(batch[:0])


def changed(tree, **fields):
    old = {name: getattr(tree, name) for name in tree.__dataclass_fields__}
    return unchecked(type(tree), **{**old, **fields})


def test_a_fit_tells_of_a_plan_that_stopped_short(objects):
    """All steps were done, and the plan at the end missed its tolerance: both are said."""
    fit = objects["PairFit"]
    short = changed(fit, plan=changed(fit.plan, status=jnp.asarray(Status.PRECISION)))
    assert "all steps were done" in short.message and "what this precision can reach" in short.message
    assert "its plan: precision" in repr(short) and "plan: precision" in short.summary()
    graph = objects["GraphFit"]
    status = jnp.array([Status.CONVERGED, Status.NOT_CONVERGED])
    plans = changed(jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), graph.plans), status=status)
    assert "(of 2: 1 not converged, 1 converged)" in changed(graph, plans=plans).message


def test_a_fit_whose_plan_stopped_short_has_not_converged():
    """Of an epsilon of which float32 resolves the plan to 3e-4: the fit said "converged", and its plan that it had not."""
    gmms = [random_mixture(seed, K, D, condition=10) for seed in (0, 1)]
    clouds = [points(gmm, N, seed) for seed, gmm in enumerate(gmms)]
    for epsilon in (1e-6, 1e-2):
        pair = cg.GaussianMixturePair(*gmms, epsilon)
        fit = cg.fit_pair(*clouds, pair, transport_weight=0.05, m_steps=10, tol=1e-3, fidelity=False)
        assert bool(fit.converged) == bool(fit.plan.converged) == (epsilon == 1e-2)
    assert fit.message == Status.CONVERGED.message


def test_a_barycenter_whose_means_of_covariances_did_not_settle_says_so(monkeypatch):
    """Their loop stopped at its last step in silence, and the barycenter "converged"."""
    program = importlib.import_module("coupled_gmm.barycenters.barycenter")._barycenter
    gmms = [random_mixture(seed, K, D, condition=1e4) for seed in (0, 1)]
    assert cg.barycenter(gmms, gmms[0]).converged
    monkeypatch.setattr("coupled_gmm.gaussians.bures._BARYCENTER_STEPS", 2)
    program.clear_cache()
    short = cg.barycenter(gmms, gmms[0])
    program.clear_cache()
    assert not short.converged and "had not settled" in short.message


def test_statuses_under_a_transformation_are_refused_by_name(objects):
    with pytest.raises(TypeError, match=r"^status: under a transformation"):
        jax.eval_shape(lambda plan: plan.message and 0, objects["Plan"])


# Which statuses a class can have, the function that makes it, and arguments that its inputs take.
CAN_HAVE = {
    "Plan": (cg.solve_plan, {"CONVERGED", "COMPOSED", "NOT_CONVERGED", "PRECISION", "NOT_FINITE"}),
    "PairFit": (cg.fit_pair, {status.name for status in Status} - {"STARVED", "MEAN_NOT_CONVERGED"}),
    "GraphFit": (cg.fit_graph, {status.name for status in Status} - {"MEAN_NOT_CONVERGED"}),
    "MixtureFit": (cg.fit_gmm, {status.name for status in Status} - {"PLAN_NOT_CONVERGED", "MEAN_NOT_CONVERGED"}),
    "BarycenterFit": (
        cg.barycenter,
        {"CONVERGED", "STEPS_DONE", "NOT_CONVERGED", "MEAN_NOT_CONVERGED", "PLAN_NOT_CONVERGED", "NOT_FINITE"},
    ),
    "FlowFit": (cg.flow, {"STEPS_DONE", "PLAN_NOT_CONVERGED", "NOT_FINITE"}),
}
OF_THE_PAIR = {cg.solve_plan, cg.fit_pair, cg.fit_graph}  # whose inputs have an epsilon
ARGUMENTS = (
    "ridge", "epsilon", "tol", "max_iterations", "max_steps", "em_steps", "learning_rate", "learning rate", "step_size",
    "step size", "optimizer", "transport_weight", "transport weight", "m_steps", "n_components", "method", "rho", "tau",
)  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_remedies_name_what_there_is(objects, name):
    function, statuses = CAN_HAVE[name]
    parameters = set(inspect.signature(function).parameters)
    if function in OF_THE_PAIR:
        parameters |= {"epsilon", "rho", "tau"}
    if function is cg.fit_graph:
        parameters.add("transport_weight")  # an edge's weight
    for ended in statuses:
        text = changed(objects[name], status=jnp.asarray(Status[ended])).message
        text = text.replace("init_gmm(key, x, n_components)", "")
        for path in re.findall(r"\b(history(?:\.\w+)+)", text):
            value = objects[name]
            for part in path.split("."):
                value = getattr(value, part)
        for argument in ARGUMENTS:
            if re.search(rf"\b{argument}\b", text):
                assert argument.replace(" ", "_") in parameters, (ended, argument, text)


def test_a_distance_names_the_plans_remedies():
    with pytest.raises(cg.FitError) as error:
        status.raise_if_failed(jnp.asarray(Status.NOT_FINITE), Plan._remedies)
    assert "ridge" not in str(error.value)


def test_a_refused_array_is_not_printed_whole():
    gmm = random_mixture(0, K, D)
    for call in (
        lambda: gmm.marginal(jnp.arange(200.0)),
        lambda: cg.fit_gmm(np.zeros((9, D)), gmm, tol=-jnp.ones(5000)),
        lambda: cg.fit_gmm(np.zeros((9, D)), gmm, max_steps=jnp.arange(300)),
        lambda: cg.solve_plan(cg.GaussianMixturePair(gmm, gmm), method=jnp.arange(100)),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert "Array(" not in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200
