"""The command line: ``coupled-gmm fit``, ``choose``, ``barycenter``, ``flow``, ``batch``, each of a CONFIG.toml; ``show DIR``.

Exit status: 0 done; 1 the job failed, or did not converge where it was asked to, or some of a batch did; 2 bad input or
configuration, a line on standard error for each mistake.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import typer

import coupled_gmm as cg
from coupled_gmm.core import installation, interrupts
from coupled_gmm.jobs import batch, cache, execution, parts, run, terminal, workers
from coupled_gmm.jobs.registry import COMMANDS, JOBS, job_for, load_config
from coupled_gmm.jobs.sections import ConfigError, at
from coupled_gmm.jobs.tables import print_sheets
from coupled_gmm.jobs.terminal import say

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
# readable=False: what can't be read we say ourselves, in one line.
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.toml", help="The configuration.", show_default=False, readable=False)
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run folder, in place of output.directory.", readable=False)
]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Compile anew, and keep no compiled program in the user's cache folder.")
]


def main() -> None:
    """The entry point ``coupled-gmm``."""
    interrupts.watch()
    terminal.settle()
    try:
        app()
    finally:
        interrupts.ignore()


@app.callback()
def _commands() -> None:
    """Gaussian mixtures fitted together, and optimal transport between them."""


def _add_command(name: str) -> None:
    @app.command(name, help=next(job.summary for job in JOBS if job.command == name))
    def command(path: ConfigFile, out: Out = None, no_cache: NoCache = False) -> None:
        if not no_cache:
            cache.keep_programs()
        _run(name, path, out)


for _name in COMMANDS:
    _add_command(_name)


@app.command("batch", help="Run many jobs: files, a manifest, sweeps. Run again, it goes on.")
def run_batch(
    path: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The batch's configuration.", readable=False)
    ] = None,
    out: Out = None,
    no_cache: NoCache = False,
    n_workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Run on so many processes, by Dask.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Dask cluster that is there.")
    ] = None,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Run only the I-th of N shares of the jobs.")] = "1/1",
    status: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Say how far the batch of a folder is.", readable=False)
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try jobs again that have failed.")] = False,
) -> None:
    console = terminal.console()
    with _exit_status("batch"):
        if status is not None and path is not None:
            raise ConfigError("--status: is for a folder alone; leave the configuration out")
        if status is not None:
            for line in execution.status(parts.existing(status)):
                say(console, line)
            return
        if path is None:
            raise ConfigError("CONFIG.toml: no configuration; name a CONFIG.toml, or a folder with --status")
        if n_workers is not None and scheduler is not None:
            raise ConfigError("--scheduler: there are --workers already; keep one of them")
        whole = batch.load(path, None if out is None else str(out))
        share = execution.Shard.parse(shard).of(whole.tasks)
        runner: workers.Runner = workers.here
        if n_workers is not None:
            runner = workers.local(n_workers, not no_cache, console)
        elif scheduler is not None:
            runner = workers.remote(scheduler, not no_cache, console)
        elif not no_cache:
            cache.keep_programs()
        place = parts.claimed(whole)
        say(console, f"batch: {len(share):,} of {len(whole.tasks):,} jobs, {place.folder}")
        ended = execution.run(place, share, runner, console, retry_failed)
        execution.summarise(place, console)
        say(console, str(ended))
        if reason := terminal.lost():
            terminal.say_error(f"standard output can't be written ({reason}); the results are in {place.folder}")
        if ended.failed:
            raise cg.FitError(
                f"{ended.failed:,} of {sum(ended):,} jobs; `coupled-gmm batch --status {place.folder}` says why"
            )


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="A folder that a run wrote.", show_default=False, readable=False)],
    name: Annotated[str | None, typer.Option("--job", metavar="NAME", help="The job, of a batch's folder.")] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Save that job's result too.", readable=False)
    ] = None,
) -> None:
    """Print the tables of a run."""
    with _exit_status("run"), jax.enable_x64(True):  # float64 runs are shown as they were; float32 stays float32
        if save is not None and name is None:
            raise ConfigError("--save: is for a job of a batch; name one with --job, or copy fit.npz")
        job, result = run.read(directory) if name is None else parts.result_of(directory, name)
        if save is not None:
            with at(Path("--save"), str(save)):
                cg.save(save, result)
        print_sheets(console := terminal.console(), job.sheets(result))
        say(console, result.message)
        if reason := terminal.lost():
            terminal.say_error(f"standard output can't be written ({reason}); nothing was shown")
            raise typer.Exit(1)


def _run(command: str, path: Path, out: Path | None) -> None:
    """A command's job from its configuration to its folder; `out` is that folder, if not the configured one."""
    console = terminal.console()
    with _exit_status(command):
        job = job_for(command, path)
        config = load_config(path, job.config)
        if out is not None:
            output = config.output.model_copy(update={"directory": str(out)})
            config = config.model_copy(update={"output": output})
        with jax.enable_x64(config.precision == "float64"):
            with console.status("reading"):
                inputs = job.read(path, config)
            with run.reserve(path, config) as place:
                config, result = job.solve(path, config, inputs, console)
                with console.status("writing the run folder"):
                    place.write(job, config, result, inputs)
            print_sheets(console, job.sheets(result))
            say(console, f"run folder: {place.folder}")
            if reason := terminal.lost():
                terminal.say_error(f"standard output can't be written ({reason}); the run is in {place.folder}")
            result.raise_if_failed()
            say(console, result.message)


@contextlib.contextmanager
def _exit_status(job: str) -> Iterator[None]:
    """What went wrong as a status and lines on standard error; a traceback only for our own mistakes."""
    try:
        yield
    except (ConfigError, installation.MissingExtraError) as error:
        terminal.say_error(str(error))
        raise typer.Exit(2) from error
    except cg.FitError as error:
        terminal.say_error(f"the {job} failed: {error}")
        raise typer.Exit(1) from error
    except workers.LostClusterError as error:
        terminal.say_error(str(error))
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:  # where nobody watches for signals
        terminal.say_error(interrupts.line())
        raise typer.Exit(130) from error


if __name__ == "__main__":
    main()
