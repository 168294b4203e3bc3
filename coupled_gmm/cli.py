"""The command line: ``coupled-gmm fit``, ``barycenter`` and ``flow``, each of a CONFIG.toml, and ``coupled-gmm show DIR``.

Exit status: 0 done; 1 the job failed, or did not converge where it was asked to; 2 bad input or configuration, a line
on standard error for each mistake.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import optax
import typer
from jaxtyping import Array
from rich.console import Console

import coupled_gmm as cg
from coupled_gmm.core import checks, installation, interrupts
from coupled_gmm.core.progress import ProgressBar
from coupled_gmm.core.status import Status
from coupled_gmm.data import clouds
from coupled_gmm.jobs import config, mixtures, run, tables, terminal
from coupled_gmm.jobs.config import BarycenterConfig, FitConfig, FlowConfig, Job, load_config
from coupled_gmm.jobs.sections import ConfigError, at, blame
from coupled_gmm.jobs.terminal import say

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
_USABLE = (Status.CONVERGED, Status.STEPS_DONE, Status.NOT_CONVERGED, Status.PRECISION)  # ends of a start
# Arguments whose key has another name, or stands in another section.
_FIT_KEYS = {"x": "data", "x0": "data.cloud0", "x1": "data.cloud1", "point_weights": "data.weights0"}
_FIT_KEYS |= {"point_weights0": "data.weights0", "point_weights1": "data.weights1", "ridge": "fit.ridge"}
_FIT_KEYS |= {"init": "fit.ridge", "gmm": "fit.ridge", "pair.gmm0": "fit.ridge", "pair.gmm1": "fit.ridge"}
_BARYCENTER_KEYS = {"init": "start.mixtures"}
_FLOW_KEYS = {"source": "source"}

Points = tuple[np.ndarray | Array, np.ndarray | Array]
Weights = tuple[np.ndarray | None, np.ndarray | None]


class Beside(NamedTuple):
    """What was read beside the points of two clouds."""

    weights: Weights = (None, None)
    names: tuple[str, ...] | None = None  # of the features
    notes: Sequence[str] = ()


# readable=False: what can't be read we say ourselves, in one line.
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.toml", help="The configuration.", show_default=False, readable=False)
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Run folder, in place of output.directory.", readable=False)
]


def main() -> None:
    """The entry point ``coupled-gmm``."""
    interrupts.watch()
    terminal.settle()
    app()


@app.callback()
def _commands() -> None:
    """Gaussian mixtures fitted together, and optimal transport between them."""


@app.command()
def fit(path: ConfigFile, out: Out = None) -> None:
    """Fit two mixtures to two clouds, so that they stay close."""
    _run(path, out, FitConfig, _read_data, _fit)


@app.command()
def barycenter(path: ConfigFile, out: Out = None) -> None:
    """Find the mixture closest to several: their barycenter."""
    _run(path, out, BarycenterConfig, _read_members, _barycenter)


@app.command()
def flow(path: ConfigFile, out: Out = None) -> None:
    """Let a mixture flow to others, and keep its path."""
    _run(path, out, FlowConfig, _read_ends, _flow)


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="A folder that a run wrote.", show_default=False, readable=False)],
) -> None:
    """Print the tables of a run."""
    with _exit_status("run"), jax.enable_x64(True):  # float64 runs are shown as they were; float32 stays float32
        result = run.read(directory)
        tables.print_summary(console := terminal.console(), result)
        say(console, result.message)
        if reason := terminal.lost():
            terminal.say_error(f"standard output can't be written ({reason}); nothing was shown")
            raise typer.Exit(1)


def _run(
    path: Path,
    out: Path | None,
    job: type[Job],
    read: Callable[[Path, Job], tuple[Any, Any]],
    solve: Callable[[Path, Job, Any, Any, Console], tuple[Job, Any]],
) -> None:
    """A job from its configuration to its folder.

    Args:
      path: of the configuration.
      out: the run folder, if not the configured one.
      job: the configuration's class.
      read: what the configuration names: what is fitted to, and the rest.
      solve: from both, the configuration with what was chosen on the way, and the result.
    """
    console = terminal.console()
    with _exit_status(job.command):
        settings = load_config(path, job)
        if out is not None:
            output = settings.output.model_copy(update={"directory": str(out)})
            settings = settings.model_copy(update={"output": output})
        with jax.enable_x64(getattr(settings, job.command).precision == "float64"):
            with console.status("reading"):
                given, rest = read(path, settings)
            with run.reserve(path, settings) as place:
                settings, result = solve(path, settings, given, rest, console)
                with console.status("writing the run folder"):
                    place.write(settings, result, given)
            tables.print_summary(console, result)
        say(console, f"run folder: {place.folder}")
        if reason := terminal.lost():
            terminal.say_error(f"standard output can't be written ({reason}); the run is in {place.folder}")
        result.raise_if_failed()
        say(console, result.message)


def _fit(path: Path, settings: FitConfig, points: Points, beside: Beside, console: Console) -> tuple[FitConfig, Any]:
    weights = beside.weights
    for note in beside.notes:
        say(console, note)
    if beside.names is not None:  # kept in the run's configuration, and shown by its pictures
        data = settings.data.model_copy(update={"columns": list(beside.names)})
        settings = settings.model_copy(update={"data": data})
    sizes = " and ".join(f"{len(x):,}" for x in points)
    say(console, f"clouds: {sizes} points of {points[0].shape[1]} features, {settings.fit.precision}")
    with console.status("fitting the start"), blame(path, "start", config.Start, _FIT_KEYS):
        pooled = _pooled_start(settings, points, weights)
    components = settings.start.n_components
    say(console, f"start: one mixture of {components} for both clouds, {int(pooled.n_steps)} EM steps")
    with blame(path, "fit", config.Fit, _FIT_KEYS):
        pair = _pair(settings.fit, pooled.gmm)
        with ProgressBar(console) as bar:
            result = _fit_pair(settings.fit, pair, points, weights, bar)
    if settings.fit.epsilon is None:
        chosen = settings.fit.model_copy(update={"epsilon": float(f"{float(pair.epsilon):.9g}")})
        settings = settings.model_copy(update={"fit": chosen})
    return settings, result


def _read_members(path: Path, settings: BarycenterConfig) -> tuple[list[cg.GaussianMixture], list[cg.GaussianMixture]]:
    """The mixtures, and the starts."""
    start, precision = settings.start, settings.barycenter.precision
    gmms = mixtures.read_all(path, "mixtures", settings.mixtures, precision)
    if start.mixtures is not None:
        return gmms, mixtures.read_all(path, "start.mixtures", start.mixtures, precision)
    return gmms, mixtures.drawn(path, settings, gmms)


def _barycenter(
    path: Path,
    settings: BarycenterConfig,
    gmms: list[cg.GaussianMixture],
    starts: list[cg.GaussianMixture],
    console: Console,
) -> tuple[BarycenterConfig, cg.BarycenterFit]:
    section = settings.barycenter
    say(console, f"mixtures: {_described(gmms)}")
    say(console, f"start: {_described(starts) if len(starts) == 1 else f'{len(starts)} mixtures'}")
    same = ("projection", "method", "epsilon", "learn_weights", "max_steps", "tol")
    options = {name: getattr(section, name) for name in same}
    coefficients = [member.coefficient for member in settings.mixtures]
    with (
        console.status("compiling and running the descent"),
        blame(path, "barycenter", config.Barycenter, _BARYCENTER_KEYS),
    ):
        result = jax.block_until_ready(cg.barycenter(gmms, starts, coefficients=coefficients, **options))
    if len(starts) > 1:
        say(console, f"best of {len(starts)} starts: number {int(result.start)}, counted from 0")
    return settings, result


def _read_ends(path: Path, settings: FlowConfig) -> tuple[list[cg.GaussianMixture], cg.GaussianMixture]:
    """The targets, and the source."""
    precision = settings.flow.precision
    source = mixtures.read(path, "source", settings.source, precision)
    return mixtures.read_all(path, "targets", settings.targets, precision), source


def _flow(
    path: Path,
    settings: FlowConfig,
    targets: list[cg.GaussianMixture],
    source: cg.GaussianMixture,
    console: Console,
) -> tuple[FlowConfig, cg.FlowFit]:
    section = settings.flow
    say(console, f"source: {_described([source])}")
    say(console, f"targets: {_described(targets)}")
    options = {name: getattr(section, name) for name in ("steps", "step_size", "method", "epsilon")}
    options["coefficients"] = [member.coefficient for member in settings.targets]
    if section.optimizer == "adam":
        options |= {"optimizer": optax.adam, "mean_rate": 1.0 if section.mean_rate is None else section.mean_rate}
    with console.status("compiling and running the flow"), blame(path, "flow", config.Flow, _FLOW_KEYS):
        return settings, jax.block_until_ready(cg.flow(source, targets, **options))


def _described(gmms: list[cg.GaussianMixture]) -> str:
    *sizes, last = [str(gmm.n_components) for gmm in gmms]
    listed = f"{', '.join(sizes)} and {last}" if sizes else last
    return f"{listed} components of {gmms[0].n_features} features, {gmms[0].dtype}"


def _read_data(path: Path, settings: FitConfig) -> tuple[Points, Beside]:
    """Both clouds with all the digits that the files hold (the fit centres them before it rounds), and what is beside them."""
    data = settings.data
    if data.source == "tutorial":
        x0, x1 = clouds.tutorial_clouds(jax.random.key(data.seed or 0), data.n or config.TUTORIAL_SIZE)
        return (x0, x1), Beside()
    if data.source == "photographs":
        with blame(path, "data", config.Data, _FIT_KEYS):
            x0, x1 = clouds.photograph_clouds(data.n, data.seed or 0)
        dtype = np.dtype(settings.fit.precision)
        return (x0.astype(dtype), x1.astype(dtype)), Beside()
    (cloud0, w0), (cloud1, w1) = (_read_side(path, data, side, settings.fit.precision) for side in "01")
    with blame(path, "data", config.Data, _FIT_KEYS):
        given = cloud1.names
        cloud0, cloud1 = clouds.paired(("cloud0", "cloud1"), cloud0, cloud1)
    x0, x1 = cloud0.points, cloud1.points
    if x0.shape[1] != x1.shape[1]:
        both = f"{x1.shape[1]} features and cloud0 has {x0.shape[1]}"
        raise ConfigError(f"{path}: data.cloud1: has {both}; choose the same ones with columns")
    notes = [f"cloud{side}: {note}" for side, cloud in enumerate((cloud0, cloud1)) for note in cloud.notes]
    if given != cloud1.names:
        notes.append(f"cloud1: columns put into cloud0's order, {', '.join(cloud0.names or ())}")
    return (x0, x1), Beside((w0, w1), cloud0.names if cloud1.names else None, notes)


def _read_side(path: Path, data: config.Data, side: str, precision: str) -> tuple[clouds.Cloud, np.ndarray | None]:
    file, name = getattr(data, f"cloud{side}"), getattr(data, f"weights{side}")
    inside = None if config.is_file(name) else name
    with at(path, f"data.cloud{side}"):
        exclude = [] if inside is None else [inside]
        options = {"columns": data.columns, "key": getattr(data, f"key{side}"), "header": _header(data, file)}
        cloud = clouds.read_named_cloud(file, exclude=exclude, **options)
        single = cloud.points.dtype == np.float32 and precision == "float32"
        cloud = cloud._replace(points=cloud.points if single else cloud.points.astype(np.float64))
        checks.points(file, cloud.points)
    if name is None:
        return cloud, None
    with at(path, f"data.weights{side}"):
        source = name if inside is None else file
        w = clouds.read_weights(source, name=inside, header=_header(data, source)).astype(np.float64)
        checks.weights(source, w, len(cloud.points))
        return cloud, w


def _header(data: config.Data, file: str) -> bool | None:
    return data.header if clouds.ending(file) in clouds.TEXT else None


def _pooled_start(settings: FitConfig, points: Points, weights: Weights) -> Any:
    """One mixture fitted to both clouds together, each cloud counting by its number of points.

    Raises:
      FitError: that fit failed. Where its steps ran out, it is a start all the same.
    """
    start, ridge = settings.start, settings.fit.ridge
    pooled, point_weights = np.concatenate(points), None
    if any(w is not None for w in weights):
        pairs = zip(points, weights, strict=True)
        point_weights = np.concatenate([np.ones(len(x)) if w is None else w / w.mean() for x, w in pairs])
    shared = {"point_weights": point_weights, "ridge": ridge}
    init = cg.init_gmm(jax.random.key(start.seed), pooled, start.n_components, n_init=start.n_init, **shared)
    found = cg.fit_gmm(pooled, init, max_steps=start.max_steps, tol=start.tol, **shared)
    if int(found.status) not in _USABLE:
        raise cg.FitError(f"its start, one mixture for both clouds: {found.message}")
    return found


def _pair(section: config.Fit, gmm: cg.GaussianMixture) -> cg.GaussianMixturePair:
    if section.rho is not None:
        return cg.GaussianMixturePair.from_rho(gmm, gmm, section.epsilon, _prices(section.rho))
    return cg.GaussianMixturePair(gmm, gmm, section.epsilon, 1.0 if section.tau is None else _prices(section.tau))


def _prices(given: float | list[float]) -> Any:
    return np.asarray(given) if isinstance(given, list) else given


def _fit_pair(
    section: config.Fit, pair: cg.GaussianMixturePair, points: Points, weights: Weights, progress: Any
) -> cg.PairFit:
    same = ("transport_weight", "em_steps", "m_steps", "learning_rate", "tol", "freeze", "ridge", "method")
    return cg.fit_pair(
        *points,
        pair,
        point_weights0=weights[0],
        point_weights1=weights[1],
        optimizer=optax.adam if section.optimizer == "adam" else None,
        chunk_size=section.chunk_size,
        progress=progress,
        **{name: getattr(section, name) for name in same},
    )


@contextlib.contextmanager
def _exit_status(job: str) -> Iterator[None]:
    """What went wrong as a status and lines on standard error; a traceback only for our own mistakes."""
    try:
        yield
    except ConfigError as error:
        terminal.say_error(str(error))
        raise typer.Exit(2) from error
    except installation.MissingExtraError as error:
        terminal.say_error(str(error))
        raise typer.Exit(2) from error
    except cg.FitError as error:
        terminal.say_error(f"the {job} failed: {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:  # where nobody watches for signals
        terminal.say_error(interrupts.line())
        raise typer.Exit(130) from error


if __name__ == "__main__":
    main()
