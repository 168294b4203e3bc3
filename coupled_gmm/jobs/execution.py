"""A batch on its way: what is done, what is left, whose share it is; each job written down as it ends."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console

from coupled_gmm.core.checks import brief
from coupled_gmm.core.progress import TaskBar
from coupled_gmm.jobs.batch import Task
from coupled_gmm.jobs.parts import SUMMARIES, BatchFolder, Record
from coupled_gmm.jobs.sections import ConfigError
from coupled_gmm.jobs.terminal import plain, say
from coupled_gmm.jobs.workers import Runner

_MOST_SHARDS = 1_000_000


class Shard(NamedTuple):
    """Every `total`-th job from the `number`-th on, counted from 1."""

    number: int = 1
    total: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From words such as 3/10.

        Raises:
          ConfigError: there is no such shard.
        """
        found = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text, re.ASCII)
        shard = cls(*map(int, found.groups())) if found else cls(0)
        if not 1 <= shard.number <= shard.total <= _MOST_SHARDS:
            raise ConfigError(f"--shard: must be i/n, from 1/n to n/n, got {brief(text)}")
        return shard

    def of(self, tasks: Sequence[Task]) -> list[Task]:
        return list(tasks[self.number - 1 :: self.total])


class Count(NamedTuple):
    """How many jobs ended well, how many failed, and how many are left."""

    done: int
    failed: int
    left: int

    def __str__(self) -> str:
        total = sum(self)
        return f"{total:,} {'job' if total == 1 else 'jobs'}: {self.done:,} done, {self.failed:,} failed, {self.left:,} left"


def count(records: Sequence[Record | None]) -> Count:
    """Of records, None for a job that has none."""
    kinds = Counter("left" if record is None else "failed" if record.failed else "done" for record in records)
    return Count(kinds["done"], kinds["failed"], kinds["left"])


def status(place: BatchFolder) -> Iterator[str]:
    """Lines about a batch: how far it is, and what went wrong."""
    records = list(place.records(place.batch.tasks))
    yield f"{place.folder}: {count(records)}"
    for record in records:
        if record is not None and record.failed:
            yield failure(record)


def failure(record: Record) -> str:
    """A line about a job that failed."""
    return f"{record.name}: failed: {record.error}"


def run(place: BatchFolder, tasks: Sequence[Task], runner: Runner, console: Console, retry_failed: bool) -> Count:
    """All that is left of some of a batch's jobs.

    Args:
      place: where records go.
      tasks: the jobs.
      runner: a context manager around the records of jobs, as they end.
      console: where progress is shown.
      retry_failed: whether jobs that have failed are done again.

    Returns:
      How all these jobs have ended, earlier and now.

    Raises:
      ConfigError: a record can't be written.
    """
    ended = dict(zip([task.digest for task in tasks], place.records(tasks), strict=True))
    for task in tasks:
        if ended[task.digest] is None and place.remove_damaged(task):
            say(console, f"{task.name}: its file was no whole record of it; it is done again")
    before = count(list(ended.values()))
    todo = [task for task in tasks if (record := ended[task.digest]) is None or (record.failed and retry_failed)]
    if before.left < len(tasks):
        again = "; these are tried again" if retry_failed else "; --retry-failed tries these again"
        say(console, f"earlier: {before.done:,} done, {before.failed:,} failed{again if before.failed else ''}")
    if todo:
        place.forget_summary()
        with contextlib.ExitStack() as stack:
            records = stack.enter_context(runner(todo))
            bar = stack.enter_context(TaskBar(console, len(todo)))
            for record in records:
                place.write(record)
                ended[record.digest] = record._replace(result=None)
                bar.advance(plain(_told(record)), record.failed)
    return count(list(ended.values()))


def summarise(place: BatchFolder, console: Console) -> None:
    """The summary where all jobs have ended, whoever did them; else how many have not.

    Raises:
      ConfigError: it can't be written.
    """
    records = list(place.records(place.batch.tasks))
    whole = [record for record in records if record is not None]
    if len(whole) == len(records):
        place.write_summary(whole)
        say(console, f"summary: {place.folder / SUMMARIES[1]}")
    else:
        say(
            console,
            f"{len(records) - len(whole):,} of the batch's {len(records):,} jobs are left; the summary waits for them",
        )


def _told(record: Record) -> str:
    if record.failed:
        return failure(record)
    numbers = [f"{name} {value:.6g}" for name, value in record.measures.items()]
    return f"{record.name}: {', '.join([record.status, *numbers])}"
