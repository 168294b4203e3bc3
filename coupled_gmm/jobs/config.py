"""What configurations of several jobs share: kinds of values, how plans are solved, what is left, and the whole of one."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from coupled_gmm.core.checks import MOST_STARTS, MOST_STEPS
from coupled_gmm.jobs.sections import FileName, Section, refuse

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Starts = Annotated[int, Field(ge=1, le=MOST_STARTS)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # JAX's keys of larger ones are those of smaller ones
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Precision = Literal["float32", "float64"]


class PlanOptions(Section):
    """How plans to the given mixtures are solved."""

    method: Literal["exact", "entropic"] = "exact"
    epsilon: Positive | None = None
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _blurred(self) -> Self:
        if self.method == "exact" and self.epsilon is not None:
            raise refuse("exact plans have none; remove it, or set method = 'entropic'", "epsilon")
        return self


class Output(Section):
    """What the run folder holds."""

    directory: FileName | None = None  # None: runs/NAME-OF-THE-CONFIGURATION
    pictures: bool = True


class JobConfig(Section):
    """All of a configuration; build it with `registry.load_config`."""

    command: ClassVar[str]  # and the section of that name, which has the precision
    if TYPE_CHECKING:  # its place among the sections is the job's to say: the last
        output: Output

    @classmethod
    def claims(cls, values: Mapping[str, Any]) -> bool:
        """Whether tables are those of this job, where several have one command."""
        del values
        return True

    def completed(self) -> Self:
        """With defaults written out that depend on other keys."""
        return self

    @property
    def precision(self) -> Precision:
        """In which the job computes."""
        return getattr(self, self.command).precision
