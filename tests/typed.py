"""What `--jaxtyping-packages` of pyproject.toml checks annotations with: shapes and kinds of numbers of all arrays, by beartype.

What is no array of numbers is left to pyright, and to the package's own checks: tests hand public functions all that they refuse by
name.
"""

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, PRNGKeyArray


def arrays(function: Callable) -> Callable:
    """A function whose arrays are checked, when it is called and when it returns."""
    annotations = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in annotations.items() if _holds_arrays(hint)}
    checked = beartype(function)
    function.__annotations__ = checked.__annotations__ = annotations
    return checked


def _holds_arrays(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return hint not in typing.get_args(PRNGKeyArray)
    return any(_holds_arrays(each) for each in typing.get_args(hint))
