"""The lines that a docstring shows run, and say what they say."""

import doctest

import pytest

import coupled_gmm as cg


@pytest.mark.parametrize(
    "function",
    [cg.fit_pair, cg.solve_plan, cg.barycenter, cg.links, cg.fit_classes],
    ids=lambda function: function.__name__,
)
def test_examples(function):
    (examples,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={"cg": cg})
    assert examples.examples
    said = []
    assert doctest.DocTestRunner().run(examples, out=said.append).failed == 0, "".join(said)
