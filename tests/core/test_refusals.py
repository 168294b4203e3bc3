"""Refusals of arguments hold their parts, and say what they said when they were one text."""

import pickle

import numpy as np
import pytest

import coupled_gmm as cg
from coupled_gmm.core import checks
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError


@pytest.mark.parametrize("cls", [ArgumentError, ArgumentTypeError])
def test_parts_survive_a_trip_between_processes(cls):
    for parts, text in ((("x", "is odd", "even it"), "x: is odd; even it"), (("x[2]", "is odd"), "x[2]: is odd")):
        error = pickle.loads(pickle.dumps(cls(*parts)))
        assert type(error) is cls and str(error) == text
        assert (error.argument, error.problem, error.remedy) == (*parts, "")[:3]


def test_twins_are_the_builtin_errors():
    assert issubclass(ArgumentError, ValueError) and not issubclass(ArgumentError, TypeError)
    assert issubclass(ArgumentTypeError, TypeError) and not issubclass(ArgumentTypeError, ValueError)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: checks.scalar("tol", -1, at_least=0), "tol"),
        (lambda: checks.scalar("tol", "1"), "tol"),
        (lambda: checks.points("x0", [[1.0, np.nan]]), "x0"),
        (lambda: checks.points("x0", [[1.0], [1.0, 2.0]]), "x0"),
        (lambda: checks.integer("clouds[3]", 0.5, 1), "clouds[3]"),
        (lambda: cg.GaussianMixture.from_moments(np.zeros((1, 1)), -np.ones((1, 1, 1)), [1.0]), "covariances"),
        (lambda: cg.barycenter([], []), "gmms"),
    ],
)
def test_the_argument_is_a_field(call, argument):
    with pytest.raises((ArgumentError, ArgumentTypeError)) as caught:
        call()
    assert caught.value.argument == argument
    assert str(caught.value).startswith(f"{argument}: ")
