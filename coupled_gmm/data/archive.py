"""A .npz of plain arrays: written whole or not at all, and read without trust.

NumPy's reader allocates what a file claims, unpacks what is packed, and raises a dozen kinds of errors on damage. Here sizes are
checked against the file's own before anything is allocated, members are stored and never packed, and there is one kind of error.
"""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from coupled_gmm.data import files

_ENDING = ".npy"
_ENCRYPTED = 0x1 | 0x40  # flags of a zip's member
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class Damaged(ValueError):
    """No .npz of plain, stored arrays; the message says why."""


class Archive:
    """The arrays of an open .npz by name; each is read, and its checksum of the zip tested, when it is asked for."""

    def __init__(self, file: zipfile.ZipFile, size: int):
        self._file = file
        self._members = _checked(file.infolist(), size)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._members)

    def __getitem__(self, name: str) -> np.ndarray:
        """The array, in memory of its own.

        Raises:
          KeyError: there is none of this name.
          Damaged: it is no array of numbers or text.
        """
        member = self._members[name]
        with _as_damaged():
            return _array(self._file.read(member))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The .npz at a path.

    Raises:
      FileNotFoundError, PermissionError, OSError: there is none, or it can't be read.
      Damaged: it is none.
    """
    files.regular(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise type(error)(f"{path}: can't be read ({error.strerror}); check its permissions") from error
    with file:
        yield _archive(file, os.fstat(file.fileno()).st_size)


@contextlib.contextmanager
def held(content: bytes) -> Iterator[Archive]:
    """The .npz that bytes are.

    Raises:
      Damaged: they are none.
    """
    with io.BytesIO(content) as file:
        yield _archive(file, len(content))


def _archive(file: BinaryIO, size: int) -> Archive:
    with _as_damaged():
        return Archive(zipfile.ZipFile(file), size)


def packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    """A .npz, stored, in memory: the same bytes for the same arrays, whenever it is made."""
    file = io.BytesIO()
    _write_arrays(file, arrays)
    return file.getvalue()


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """A .npz, stored, written whole or not at all.

    Raises:
      ValueError: something stands at the path that is no file.
      OSError: it can't be written; nothing is left behind.
    """
    with files.whole(path) as file:
        _write_arrays(file, arrays)


def _write_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """As `np.savez`, whose old versions have no way to refuse objects, and take the wish for one more array.

    Members have no date (zip's first, 1980): equal arrays are equal files.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            about = zipfile.ZipInfo(f"{name}.npy")
            about.external_attr = 0o600 << 16  # for who unpacks it
            with archive.open(about, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


@contextlib.contextmanager
def _as_damaged() -> Iterator[None]:
    """Whatever zipfile, NumPy and Python's parser raise on a damaged file, as one error."""
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0][:100] or type(error).__name__
        raise Damaged(ascii(reason)[1:-1]) from error


def _checked(members: list[zipfile.ZipInfo], size: int) -> dict[str, zipfile.ZipInfo]:
    """Members by the name of their array, of which none is packed and all fit into the file together."""
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise Damaged("a member is compressed")
        if member.flag_bits & _ENCRYPTED:
            raise Damaged("a member is encrypted")
        if not member.filename.endswith(_ENDING):
            raise Damaged("a member is no array")
    if sum(member.file_size for member in members) > size:
        raise Damaged("its members claim to be larger than the file")
    named = {member.filename.removesuffix(_ENDING): member for member in members}
    if len(named) < len(members):
        raise Damaged("two members have one name")
    return named


def _array(content: bytes) -> np.ndarray:
    """What a .npy holds, where that is all of it."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version not in _READERS:
        raise Damaged(f"an array of NumPy's format {version}")
    shape, fortran, dtype = _READERS[version](stream)
    if dtype.kind not in "fiubcU" or dtype.itemsize == 0:
        raise Damaged("an array of neither numbers nor text")
    if any(length < 0 for length in shape) or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise Damaged("an array's shape and size disagree")
    flat = np.frombuffer(content, dtype, offset=stream.tell())
    return (flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)).copy()
