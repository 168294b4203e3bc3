"""A batch: one configuration that is many jobs of one kind, and what they are, resolved before anything runs.

Its sections are those of the job, shared by all, and three more: [jobs] says which there are, [sweep] lists values of which every
combination is tried with each of them, [output] where results go. Resolved, every job has a configuration of its own, checked as if
it stood alone; the batch is written down as what its jobs share, and a row for each.
"""

import contextlib
import copy
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import tomli_w
from pydantic import AfterValidator, Field, model_validator

from coupled_gmm.core.checks import brief
from coupled_gmm.jobs import manifest
from coupled_gmm.jobs.job import Job
from coupled_gmm.jobs.manifest import Row
from coupled_gmm.jobs.registry import COMMANDS, JOBS, job_named
from coupled_gmm.jobs.sections import (
    LARGEST,
    ConfigError,
    File,
    FileName,
    Mistake,
    MistakesError,
    Section,
    check,
    is_utf8,
    read,
    refusal,
    refuse,
    validated,
)

RESERVED = ("name", "status", "error")  # columns of the summary
MOST_JOBS = 1_000_000
_LARGEST_RESOLVED = 10**9  # bytes
_OWN = ("command", "jobs", "sweep", "output")


def _patterns(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given


Patterns = Annotated[str | Annotated[list[str], Field(min_length=1)], AfterValidator(_patterns)]


class Jobs(Section):
    """Which jobs there are: rows of a table, pairs of files, or one."""

    manifest: File | None = None
    keep: list[str] = Field(default=[])  # columns that are no keys, for the summary
    cloud0: Patterns | None = None
    cloud1: Patterns | None = None
    rows: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [key for key in ("manifest", "rows", "cloud0", "cloud1") if getattr(self, key) is not None]
        if len(ways) > 1 and ways != ["cloud0", "cloud1"]:
            raise refuse(f"jobs come from {ways[0]} already; keep one of them", ways[1])
        if self.keep and ways[:1] not in (["manifest"], ["rows"]):
            raise refuse("names columns of a manifest, and there is none; remove it", "keep")
        return self


class BatchOutput(Section):
    """Where results go."""

    directory: FileName | None = None  # None: runs/NAME-OF-THE-CONFIGURATION


class BatchSections(Section):
    """What a batch has beside the sections of its jobs."""

    command: str
    jobs: Jobs = Jobs()
    sweep: dict[str, Any] = Field(default={})
    output: BatchOutput = BatchOutput()

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.command not in COMMANDS:
            raise refuse(f"must be {_said(COMMANDS)}, got {brief(self.command)}", "command")
        measures = {name for job in JOBS if job.command == self.command for name in job.measures}
        for column in self.jobs.keep:
            if column in (*RESERVED, *measures, *flattened(self.sweep)):
                raise refuse(f"the summary has a column {column!r} of its own; name another", "jobs.keep")
        return self


class Task(NamedTuple):
    """One job of a batch: plain values, which travel between processes."""

    name: str
    command: str
    values: dict[str, Any]  # its configuration, all of it
    kept: dict[str, Any]
    digest: str  # of all but what is kept


class Batch(NamedTuple):
    """A batch whose jobs are known and valid."""

    path: Path
    job: Job[Any, Any, Any]
    tasks: list[Task]
    directory: str

    def differing(self) -> list[str]:
        """Dotted keys whose values are not the same in all jobs, in the order of the configuration."""
        flat = [flattened(task.values) for task in self.tasks]
        keys = dict.fromkeys(key for values in flat for key in values)
        return [key for key in keys if any(values.get(key) != flat[0].get(key) for values in flat)]

    def dump(self) -> str:
        """As TOML, which gives the same jobs again: what they share, and a row for each."""
        keys = self.differing()
        shared = flattened(self.tasks[0].values)
        kept = list(dict.fromkeys(column for task in self.tasks for column in task.kept))
        rows = []
        for task in self.tasks:
            values = flattened(task.values)
            rows.append({manifest.NAME: task.name} | {key: values[key] for key in keys if key in values} | task.kept)
        jobs: dict[str, Any] = {"keep": kept} if kept else {}
        sections: dict[str, Any] = {}
        for key, value in shared.items():
            if key not in keys:
                _set(sections, key, value)
        tables = {"command": self.job.command, **sections, "output": {"directory": self.directory}}
        return tomli_w.dumps(tables | {"jobs": jobs | {"rows": rows}})


def load(path: Path, directory: str | None = None, *, resolved: bool = False) -> Batch:
    """A batch from its configuration; `directory` is in place of the configured one.

    Raises:
      ConfigError: keys are unknown, missing or wrong, in the configuration or in a row; a line for each mistake.
    """
    values = read(path, _LARGEST_RESOLVED if resolved else LARGEST)
    if "command" not in values:  # of one job, perhaps, about which there would be more to say
        words = f"say first which jobs these are, {_said(COMMANDS)}"
        raise ConfigError(f"{path}: command: missing; {words}, or run that for one job")
    own = check(path, {key: values.pop(key) for key in _OWN if key in values}, BatchSections)
    job = job_named(own.command, _first(values, own))
    assert job is not None  # checked with the sections
    rows, sweep = _rows(path, own, job), _flat_sweep(path, own.sweep)
    tasks = _tasks(path, job, values, rows, sweep)
    where = directory or own.output.directory or str(Path("runs") / path.stem)
    return Batch(path, job, tasks, where)


def changed(old: Batch, new: Batch) -> str | None:
    """The first difference between two batches in a line, with its key; None where there is none."""
    if old.job.command != new.job.command:
        return f"command: is {new.job.command!r}, and was {old.job.command!r}"
    before = {task.name: task for task in old.tasks}
    for task in new.tasks:
        if task.name not in before:
            return f"jobs: {brief(task.name)} is new"
        if task.digest != before[task.name].digest:
            was, now = flattened(before[task.name].values), flattened(task.values)
            key = next(key for key in was | now if was.get(key) != now.get(key))
            return f"{key}: is {brief(now.get(key))}, and was {brief(was.get(key))} (job {brief(task.name)})"
    if gone := before.keys() - {task.name for task in new.tasks}:
        return f"jobs: {brief(min(gone))} is gone"
    if list(before) != [task.name for task in new.tasks]:
        return "jobs: are in another order"
    return None


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their dotted keys; lists are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _said(commands: Sequence[str]) -> str:
    return " or ".join(map(repr, commands))


def _first(values: Mapping[str, Any], own: BatchSections) -> dict[str, Any]:
    """What is known of the first job before its row is checked: which kind of job it is depends on that."""
    first = copy.deepcopy(dict(values))
    swept = {key: given[0] for key, given in flattened(own.sweep).items() if isinstance(given, list) and given}
    for key, value in {**(own.jobs.rows or [{}])[0], **swept}.items():
        with contextlib.suppress(MistakesError):  # which is said of the row
            _set(first, key, value)
    return first


def _rows(path: Path, own: BatchSections, job: Job[Any, Any, Any]) -> list[Row]:
    """Those of the table, all with a name; or the only one."""
    jobs = own.jobs
    if jobs.manifest is not None:
        return manifest.named(manifest.of_manifest(path, Path(jobs.manifest), jobs.keep, job.config))
    if jobs.rows is not None:
        if not jobs.rows:
            raise ConfigError(f"{path}: jobs.rows: has no rows; write one for each job")
        return manifest.named(manifest.of_tables(path, jobs.rows, jobs.keep))
    patterns = {key: getattr(jobs, key) for key in ("cloud0", "cloud1") if getattr(jobs, key) is not None}
    if patterns:
        return manifest.named(manifest.of_patterns(path, patterns))
    return [Row(f"{path}", str(path), None if own.sweep else job.command, {}, {}, path.parent)]


def _flat_sweep(path: Path, sweep: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Lists of values by dotted keys."""
    flat = flattened(sweep)
    lines = []
    for key, values in flat.items():
        if not isinstance(values, list) or not values:
            lines.append(f"{path}: sweep.{key}: must be a list of values, got {brief(values)}")
        elif any(value in values[:i] for i, value in enumerate(values)):
            lines.append(f"{path}: sweep.{key}: a value is there twice in {brief(values)}; keep one of them")
    if lines:
        raise refusal(path, lines)
    return flat


def _tasks(
    path: Path, job: Job[Any, Any, Any], shared: dict[str, Any], rows: Sequence[Row], sweep: Mapping[str, list[Any]]
) -> list[Task]:
    """A job for each row and each combination of the sweep, in order."""
    if len(rows) * (number := math.prod(map(len, sweep.values()))) > MOST_JOBS:
        raise ConfigError(
            f"{path}: sweep: {len(rows):,} rows and {number:,} combinations are too many jobs; take fewer"
        )
    tasks: list[Task] = []
    lines: dict[str, None] = {}  # each once, in order: a mistake in what is shared is in every job
    names: dict[str, str] = {}
    for row in rows:
        for key in row.values.keys() & sweep.keys():
            lines.setdefault(f"{path}: sweep.{key}: rows set it too; keep one of them")
        for combination in itertools.product(*sweep.values()):
            swept = dict(zip(sweep, combination, strict=True))
            name = _name(row, swept)
            if name in names:
                lines.setdefault(f"{row.where}: name: {brief(name)} is that of {names[name]} too; give each its own")
            names.setdefault(name, row.where)
            try:
                tasks.append(_task(path, name, job, shared, row, swept))
            except MistakesError as error:
                lines |= dict.fromkeys(_lines(path, row, swept, error))
    if lines:
        raise refusal(path, list(lines))
    return tasks


def _task(
    path: Path, name: str, job: Job[Any, Any, Any], shared: dict[str, Any], row: Row, swept: Mapping[str, Any]
) -> Task:
    values = _merged(shared, {**row.values, **swept})
    if row.folder != path.parent:  # files that the row names are found from there
        there = validated(values, job.config, row.folder).model_dump()
        values = _merged(values, {key: _get(there, key) for key in row.values})
    config = validated(values, job.config, path.parent).completed()
    values = config.model_dump(exclude={"output"}, exclude_none=True)
    text = json.dumps([job.command, name, values], sort_keys=True)
    for said in (name, *map(str, flattened(values).values()), *map(str, row.kept.values())):
        if not is_utf8(said):
            raise MistakesError(
                [Mistake(manifest.NAME, f"{said!a} is not UTF-8 and can't be written down; rename it", False)]
            )
    return Task(name, job.command, values, row.kept, hashlib.blake2b(text.encode(), digest_size=16).hexdigest())


def _merged(shared: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Sections with some dotted keys set."""
    values = copy.deepcopy(shared)
    for key, value in given.items():
        if key.partition(".")[0] in _OWN:
            raise MistakesError([Mistake(key, "unknown key; jobs of a batch have none of that section", True)])
        _set(values, key, value)
    return values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """A value at a dotted key, in sections and in lists of them."""
    *inside, last = key.split(".")
    place: Any = values
    try:
        for part in inside:
            place = place[int(part)] if isinstance(place, list) else place.setdefault(part, {})
        place[int(last) if isinstance(place, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise MistakesError(
            [Mistake(key, "there is no such place in what jobs share; correct the key", True)]
        ) from error


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


def _lines(path: Path, row: Row, swept: Mapping[str, Any], error: MistakesError) -> Iterator[str]:
    """Each mistake with the place where its key was set."""
    for key, text, unknown in error.mistakes:
        if _sets(swept, key):
            yield f"{path}: sweep.{key}: {text}"
        elif unknown and _sets(row.values, key):
            yield f"{row.table}: {key}: {text}" + ("" if row.table == str(path) else "; or list it in jobs.keep")
        elif key == manifest.NAME or _sets(row.values, key):
            yield f"{row.where}: {key}: {text}"
        else:
            yield f"{path}: {key}: {text}"


def _name(row: Row, swept: Mapping[str, Any]) -> str:
    """The row's, and what is swept: keys without their sections, where these tell them apart."""
    ends = [key.rpartition(".")[2] for key in swept]
    keys = ends if len(set(ends)) == len(ends) else list(swept)
    words = [f"{key}={_shown(value)}" for key, value in zip(keys, swept.values(), strict=True)]
    return " ".join([row.name, *words] if row.name else words)


def _sets(given: Mapping[str, Any], key: str) -> bool:
    """Whether a key, or what it is inside, is among those given."""
    return any(key == one or key.startswith(f"{one}.") or one.startswith(f"{key}.") for one in given)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
