"""What is installed: this package's version, and the extras that some of its functions need.

An extra is a group of other libraries with a name: ``pip install 'coupled_gmm[tables]'``. They are imported where they are used,
inside `needed`, so that a missing one is said in a line that names the extra.
"""

import importlib.util
import sys
from types import TracebackType

_COMMAND = ("filelock", "platformdirs", "polars", "pydantic", "rich", "tomli_w", "typer")  # of the extra "cli"


class MissingExtraError(ModuleNotFoundError):
    """A library of an extra is not installed."""


class needed:
    """A context manager around the import of an extra's libraries.

    Args:
      extra: its name.
      what: that needs it: a function, or an argument.

    Raises:
      MissingExtraError: a library is not installed.
    """

    def __init__(self, extra: str, what: str):
        self.extra, self.what = extra, what

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ModuleNotFoundError) and not isinstance(error, MissingExtraError):
            library = (error.name or "").partition(".")[0]
            raise MissingExtraError(_missing(self.what, library, self.extra), name=error.name) from None


def check_command() -> None:
    """End the process of a command that can't run, with a line and status 2, before anything slow is imported."""
    for library in _COMMAND:
        if importlib.util.find_spec(library) is None:
            print(_missing("coupled-gmm", library, "cli"), file=sys.stderr)
            raise SystemExit(2)


def version() -> str:
    """The installed version, "0+unknown" where the package runs from a folder that nobody installed."""
    import importlib.metadata  # slow to import, and only needed here

    try:
        return importlib.metadata.version("coupled_gmm")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def _missing(what: str, library: str, extra: str) -> str:
    return f"{what}: needs {library}, which is not installed; pip install 'coupled_gmm[{extra}]'"
