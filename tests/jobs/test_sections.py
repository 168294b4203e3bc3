"""What is said of an argument that was refused: the key that set it."""

from pathlib import Path

import pytest

from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError
from coupled_gmm.jobs.sections import ConfigError, Section, blame


class Steps(Section):
    steps: int = 1
    starts: int = 1


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("steps", "run.steps"),
        ("init", "start.mixtures"),
        ("init[2]", "start.mixtures.2"),
        ("starts[0]", "run.starts.0"),
        ("pair.gmm0", "run.pair"),
        ("unheard", "run: unheard"),
        ("unheard[1]", "run: unheard[1]"),
    ],
)
@pytest.mark.parametrize("error", [ArgumentError, ArgumentTypeError])
def test_refusals_name_the_key(argument, key, error):
    keys = {"init": "start.mixtures", "pair.gmm0": "run.pair"}
    with pytest.raises(ConfigError) as caught, blame(Path("c.toml"), "run", Steps, keys):
        raise error(argument, "is odd: very", "even it")
    assert str(caught.value) == f"c.toml: {key}: is odd: very; even it"


@pytest.mark.parametrize("error", [ValueError("steps: of our own making"), TypeError("no argument"), KeyError("steps")])
def test_mistakes_of_ours_are_not_blamed_on_anyone(error):
    with pytest.raises(type(error)) as caught, blame(Path("c.toml"), "run", Steps):
        raise error
    assert caught.value is error
