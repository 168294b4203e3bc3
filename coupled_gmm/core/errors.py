"""Refusals of arguments: which argument, what is wrong with it, and what to do, apart from one another.

Whoever calls with arguments that someone else named, as the command line does with keys of a file, reads the name from the
exception, not from its text.
"""


def reason(error: BaseException) -> str:
    """The first line of what an exception says; its kind, where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _Refusal(Exception):
    """``argument: problem; remedy``.

    All three stand in `args`, so that the exception survives a trip between processes.

    Args:
      argument: its name, such as ``x0``, ``pair.gmm0`` or, of one in a list, ``gmms[2]``.
      problem: what is wrong with it.
      remedy: what to do; "" where the problem says it.
    """

    def __init__(self, argument: str, problem: str, remedy: str = ""):
        super().__init__(argument, problem, remedy)
        self.argument, self.problem, self.remedy = argument, problem, remedy

    @property
    def advice(self) -> str:
        """Problem and remedy, without the argument."""
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem

    def __str__(self) -> str:
        return f"{self.argument}: {self.advice}"


class ArgumentError(_Refusal, ValueError):
    """An argument of the right type whose value can't be used."""


class ArgumentTypeError(_Refusal, TypeError):
    """An argument of a type that can't be used."""
