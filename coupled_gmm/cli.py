"""The command line: ``coupled-gmm fit CONFIG.toml`` and ``coupled-gmm show DIR``.

Exit status: 0 done; 1 the fit failed, or did not converge where it was asked to; 2 bad input or configuration, a line
on standard error for each mistake.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import typer
from jaxtyping import Array
from rich.console import Console

import coupled_gmm as cg
from coupled_gmm import checks, clouds, runs
from coupled_gmm.config import TUTORIAL_SIZE, ConfigError, Data, FitConfig, Start, is_file, load_config
from coupled_gmm.config import Fit as FitSection
from coupled_gmm.progress import ProgressBar
from coupled_gmm.result import Status

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
_WIDTH = 120  # of tables where standard output is no terminal

Points = tuple[Array, Array]
Weights = tuple[Array | None, Array | None]


def main() -> None:
    """The entry point ``coupled-gmm``."""
    app()


@app.callback()
def _commands() -> None:
    """Fit Gaussian mixtures to point clouds together, so that they stay close in optimal transport."""


@app.command()
def fit(
    config: Annotated[Path, typer.Argument(help="The fit's configuration, a TOML file.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Run folder, in place of output.directory.")] = None,
) -> None:
    """Fit two mixtures to two clouds, and keep the run in a folder."""
    console = _console()
    with _exit_status():
        settings = load_config(config)
        if out is not None:
            output = settings.output.model_copy(update={"directory": str(out)})
            settings = settings.model_copy(update={"output": output})
        with jax.enable_x64(settings.fit.precision == "float64"):
            _fit(config, settings, console)


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(help="A folder that `coupled-gmm fit` wrote.", show_default=False)],
) -> None:
    """Print the tables of a run."""
    with _exit_status(), jax.enable_x64(True):  # float64 runs are shown as they were; float32 stays float32
        result = runs.read(directory)
        runs.print_summary(console := _console(), result)
        _say(console, result.message)


def _fit(path: Path, settings: FitConfig, console: Console) -> None:
    with console.status("reading the clouds"):
        points, weights = _read_data(path, settings)
    folder = _make_folder(path, settings)
    sizes = " and ".join(f"{len(x):,}" for x in points)
    _say(console, f"clouds: {sizes} points of {points[0].shape[1]} features, {points[0].dtype}")
    with console.status("fitting the start"), _blame(path, "start", Start):
        pooled = _pooled_start(settings, points, weights)
    components = settings.start.n_components
    _say(console, f"start: one mixture of {components} for both clouds, {int(pooled.n_steps)} EM steps")
    with _blame(path, "fit", FitSection):
        pair = _pair(settings.fit, pooled.gmm)
        with ProgressBar(console) as bar:
            result = _fit_pair(settings.fit, pair, points, weights, bar)
    if settings.fit.epsilon is None:
        chosen = settings.fit.model_copy(update={"epsilon": float(f"{float(pair.epsilon):.9g}")})
        settings = settings.model_copy(update={"fit": chosen})
    with console.status("writing the run folder"):
        runs.write(folder, settings, result, points)
    runs.print_summary(console, result)
    _say(console, f"run folder: {folder}")
    result.raise_if_failed()
    _say(console, result.message)


def _read_data(path: Path, settings: FitConfig) -> tuple[Points, Weights]:
    """Both clouds and their weights, in the precision of the fit."""
    data, dtype = settings.data, jnp.dtype(settings.fit.precision)
    if data.source == "tutorial":
        x0, x1 = clouds.tutorial_clouds(jax.random.key(data.seed or 0), data.n or TUTORIAL_SIZE)
        return (x0, x1), (None, None)
    if data.source == "photographs":
        with _blame(path, "data", Data):
            x0, x1 = clouds.photograph_clouds(data.n, data.seed or 0)
        return (jnp.asarray(x0, dtype), jnp.asarray(x1, dtype)), (None, None)
    (x0, w0), (x1, w1) = (_read_side(path, data, side, dtype) for side in "01")
    if x0.shape[1] != x1.shape[1]:
        both = f"{x1.shape[1]} features and cloud0 has {x0.shape[1]}"
        raise ConfigError(f"{path}: data.cloud1: has {both}; choose the same ones with columns")
    return (x0, x1), (w0, w1)


def _read_side(path: Path, data: Data, side: str, dtype: Any) -> tuple[Array, Array | None]:
    file, name = getattr(data, f"cloud{side}"), getattr(data, f"weights{side}")
    inside = None if is_file(name) else name
    with _at(path, f"data.cloud{side}"):
        exclude = [] if inside is None else [inside]
        x = clouds.read_cloud(file, columns=data.columns, exclude=exclude, key=getattr(data, f"key{side}"))
        x = checks.points(file, x.astype(dtype))
    if name is None:
        return x, None
    with _at(path, f"data.weights{side}"):
        source = name if inside is None else file
        return x, checks.weights(source, clouds.read_weights(source, name=inside).astype(dtype), len(x))


def _make_folder(path: Path, settings: FitConfig) -> Path:
    folder = Path(settings.output.directory or "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"can't make the folder {folder} ({error.strerror}); name another"
        raise ConfigError(f"{path}: output.directory: {message}") from error
    return folder


def _pooled_start(settings: FitConfig, points: Points, weights: Weights) -> Any:
    """One mixture fitted to both clouds together, each cloud counting by its number of points."""
    start, ridge = settings.start, settings.fit.ridge
    pooled, point_weights = jnp.concatenate(points), None
    if any(w is not None for w in weights):
        pairs = zip(points, weights, strict=True)
        point_weights = jnp.concatenate([jnp.ones(len(x)) if w is None else w * len(x) / jnp.sum(w) for x, w in pairs])
    shared = {"point_weights": point_weights, "ridge": ridge}
    init = cg.init_gmm(jax.random.key(start.seed), pooled, start.n_components, n_init=start.n_init, **shared)
    found = cg.fit_gmm(pooled, init, max_steps=start.max_steps, tol=start.tol, **shared)
    if int(found.status) == Status.NOT_FINITE:
        found.raise_if_failed()
    return found


def _pair(section: FitSection, gmm: cg.GaussianMixture) -> cg.GaussianMixturePair:
    if section.rho is not None:
        return cg.GaussianMixturePair.from_rho(gmm, gmm, section.epsilon, section.rho)
    return cg.GaussianMixturePair(gmm, gmm, section.epsilon, 1.0 if section.tau is None else section.tau)


def _fit_pair(
    section: FitSection, pair: cg.GaussianMixturePair, points: Points, weights: Weights, progress: Any
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


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
    console.file.flush()


@contextlib.contextmanager
def _exit_status() -> Iterator[None]:
    """What went wrong as a status and lines on standard error; a traceback only for our own mistakes."""
    try:
        yield
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    except cg.FitError as error:
        typer.echo(f"the fit failed: {error}", err=True)
        raise typer.Exit(1) from error


@contextlib.contextmanager
def _at(path: Path, key: str) -> Iterator[None]:
    """Refusals of a file that `key` names, as a line about that key."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: {key}: {error}") from error


# Arguments whose key has another name, or stands in another section.
_KEYS = {"x": "data", "x0": "data.cloud0", "x1": "data.cloud1", "point_weights": "data.weights0"}
_KEYS |= {"point_weights0": "data.weights0", "point_weights1": "data.weights1", "ridge": "fit.ridge"}
_KEYS |= {"init": "fit.ridge", "gmm": "fit.ridge", "pair.gmm0": "fit.ridge", "pair.gmm1": "fit.ridge"}


@contextlib.contextmanager
def _blame(path: Path, section: str, model: Any) -> Iterator[None]:
    """The core's refusal of an argument, as a line about the key that set it; other errors are ours and pass."""
    try:
        yield
    except (ValueError, TypeError) as error:
        named = re.match(r"([\w.]+): (.*)", str(error), re.DOTALL)
        if named is None or isinstance(error, ConfigError):
            raise
        argument, message = named.groups()
        key = f"{section}.{argument}" if argument in model.model_fields else _KEYS.get(argument)
        if key is None:
            raise
        raise ConfigError(f"{path}: {key}: {message}") from error


if __name__ == "__main__":
    main()
