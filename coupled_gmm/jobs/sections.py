"""TOML files in sections: read, checked whole, written back, and mistakes in them said in lines.

Each mistake is one line, ``FILE: SECTION.KEY: what is wrong; what to do``, and all lines of a file come in one
`ConfigError`. The tables of a list are numbered from 0: ``mixtures.1.file`` is the file of the second ``[[mixtures]]``.
"""

import contextlib
import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from coupled_gmm.core.checks import brief
from coupled_gmm.core.errors import ArgumentError, ArgumentTypeError

LARGEST = 10_000_000  # bytes of a configuration
_MOST_LINES = 20
_LONGEST = 100  # characters of a key or of a message that is not ours


class ConfigError(ValueError):
    """A configuration, or data it names, that can't be used: one line per mistake, with the file and the key."""


class Section(BaseModel):
    """A section whose keys are all known and of the right type; the base class of every one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


T = TypeVar("T", bound=Section)


def refuse(text: str, key: str | None = None) -> PydanticCustomError:
    """What a validator raises: of a section, with the key to blame; of a field, without."""
    return PydanticCustomError("refused", "{text}", {"key": key, "text": text})  # pyright: ignore[reportArgumentType]


def absolute(name: str, info: ValidationInfo) -> str:
    """The absolute path of a file that is named in a configuration, from the folder of that."""
    folder: Path = (info.context or {})["folder"]
    try:
        return str((folder / possible(name)).resolve())
    except (OSError, RuntimeError) as error:  # links in a circle, a name that is too long
        raise refuse(f"leads nowhere ({type(error).__name__}); name another") from error


def possible(name: str) -> str:
    """A name that a file may have."""
    if "\0" in name:
        raise refuse(f"a file name can't hold a NUL character, got {brief(name)}; name another")
    return name


def is_utf8(text: str) -> bool:
    """Whether a text can be written down: a name of a file may hold bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


File = Annotated[str, AfterValidator(absolute)]
FileName = Annotated[str, AfterValidator(possible)]


def read(path: Path, largest: int = LARGEST) -> dict[str, Any]:
    """The tables of a TOML file of at most so many bytes.

    Raises:
      ConfigError: the file is missing, or not valid TOML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise ConfigError(
                f"{path}: is larger than {largest:,} bytes, so it is not a configuration; name another file"
            )
        return tomllib.loads(content.decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the name and the folder") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {_plain(str(error))}; correct that line") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid TOML: brackets are nested too deeply; take some away") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: can't be read: it is not text in UTF-8; save it as that") from error
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); give a text file") from error
    except ConfigError:
        raise
    except ValueError as error:  # Python's limit, against numbers that take long to read
        raise ConfigError(f"{path}: not valid TOML: an integer has too many digits; correct that value") from error


class Mistake(NamedTuple):
    """What is wrong with a key, and what to do."""

    key: str
    text: str
    unknown: bool  # whether there is no such key


class MistakesError(ValueError):
    """All mistakes in the values of a section."""

    def __init__(self, mistakes: list[Mistake]):
        super().__init__(mistakes)
        self.mistakes = mistakes


def check(path: Path, values: dict[str, Any], model: type[T]) -> T:
    """The tables of the file `path` as a section that holds sections.

    Raises:
      ConfigError: keys are unknown, missing or wrong; a line for each mistake.
    """
    try:
        return validated(values, model, path.parent)
    except MistakesError as error:
        raise refusal(path, [f"{path}: {mistake.key}: {mistake.text}" for mistake in error.mistakes]) from error


def validated(values: dict[str, Any], model: type[T], folder: Path) -> T:
    """Tables as a section that holds sections; relative names of files are found from `folder`.

    Raises:
      MistakesError: keys are unknown, missing or wrong.
    """
    try:
        return model.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        raise MistakesError([_mistake(details, model) for details in error.errors(include_url=False)]) from error


def refusal(path: Path, lines: Sequence[str]) -> ConfigError:
    """Lines about mistakes, the first of them where they are many."""
    shown = list(lines[:_MOST_LINES])
    if more := len(lines) - len(shown):
        shown.append(f"{path}: and {more} mistakes more; correct these first")
    return ConfigError("\n".join(shown))


def may_be_text(key: str, model: type[Section]) -> bool:
    """Whether a dotted key takes any text, or one of some words: what a table's cell holds is then taken as it stands."""
    *sections, name = key.split(".")
    try:
        return _takes_text(_inside(sections, model)[0].model_fields[name].annotation)
    except KeyError:  # an unknown key, about which there is more to say
        return False


def _takes_text(annotation: Any) -> bool:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return all(isinstance(word, str) for word in inner)
    return annotation is str or (origin in (Union, UnionType, Annotated) and any(map(_takes_text, inner)))


def dump(section: Section) -> str:
    """A section as TOML; keys without a value are left out."""
    return tomli_w.dumps(section.model_dump(exclude_none=True))


@contextlib.contextmanager
def at(path: Path, key: str) -> Iterator[None]:
    """Refusals of a file that `key` names, as a line about that key."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{path}: {key}: {error}") from error


@contextlib.contextmanager
def blame(path: Path, section: str, model: type[Section], keys: Mapping[str, str] | None = None) -> Iterator[None]:
    """The core's refusal of an argument, as a line about the key that set it; other errors are ours and pass.

    Args:
      path: the configuration.
      section: where the arguments are keys; blamed itself for an argument that no key sets.
      model: that section's class.
      keys: of arguments whose key has another name, or stands in another section. Those of lists keep their number.
    """
    try:
        yield
    except (ArgumentError, ArgumentTypeError) as error:
        argument, _, number = error.argument.removesuffix("]").partition("[")
        key = f"{section}.{argument}" if argument in model.model_fields else (keys or {}).get(argument)
        where = f"{section}: {error.argument}" if key is None else f"{key}.{number}" if number else key
        raise ConfigError(f"{path}: {where}: {error.advice}") from error


def _mistake(details: ErrorDetails, model: type[Section]) -> Mistake:
    """One of pydantic's errors in our own words."""
    location = [str(part) for part in details["loc"]]
    context, given = details.get("ctx", {}), brief(details["input"])
    key = ".".join(_plain(part) for part in location)
    match details["type"]:
        case "refused":
            inside = [part for part in (key, context["key"]) if part]
            return Mistake(".".join(inside), context["text"], False)
        case "extra_forbidden":
            return Mistake(key, f"unknown key; {_known_keys(location, model)}", True)
        case "missing" if len(location) == 1:
            return Mistake(key, f"missing; add a section {_header(location, model)}", False)
        case "missing":
            return Mistake(key, f"missing; add it to {_header(location[:-1], model)}", False)
        case "model_type":
            return Mistake(key, f"must be a section {_header(location, model)}, got {given}", False)
        case "list_type" if isinstance(details["input"], dict) and _inside(location, model)[1]:
            return Mistake(
                key, f"must be a list of sections; write {_header(location, model)}, with two brackets, for each", False
            )
    message = details["msg"].replace("Input should be", "must be").replace("List should have", "must have")
    return Mistake(key, f"{message}, got {given}", False)


def _plain(text: str) -> str:
    """Words of a file as they are, where they are short and printable."""
    return text if text.isprintable() and len(text) <= _LONGEST else brief(text)


def _known_keys(location: Sequence[str], model: type[Section]) -> str:
    """What may stand where an unknown key does, and which was probably meant."""
    names = list(_inside(location[:-1], model)[0].model_fields)
    close = difflib.get_close_matches(location[-1][:_LONGEST].lower(), names, n=1)
    guess = f"did you mean {close[0]!r}? " if close else ""
    where = f"{_header(location[:-1], model)} has" if len(location) > 1 else "the sections are"
    return f"{guess}{where} {', '.join(names)}"


def _header(location: Sequence[str], model: type[Section]) -> str:
    """A section's line in TOML."""
    name = ".".join(part for part in location if not part.isdigit())
    return f"[[{name}]]" if _inside(location, model)[1] else f"[{name}]"


def _inside(location: Sequence[str], model: type[Section]) -> tuple[type[Section], bool]:
    """The class of the innermost section at a location, and whether it is one of a list."""
    listed = False
    for part in location:
        if not part.isdigit():
            sections = _sections(model.model_fields[part].annotation)
            model, listed = next(sections, (model, False))  # or a key that holds a value
    return model, listed


def _sections(annotation: Any, listed: bool = False) -> Iterator[tuple[type[Section], bool]]:
    """The classes of sections in an annotation such as list[X] | None, and whether they are in a list."""
    listed = listed or get_origin(annotation) is list
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, listed
    for inner in get_args(annotation):
        yield from _sections(inner, listed)
