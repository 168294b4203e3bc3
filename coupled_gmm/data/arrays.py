"""Arrays from .npy and .npz files: no code is run, and no memory taken for what a header merely claims."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

_MOST_SMALLER = 1100  # deflate makes nothing smaller than by 1032


def read(path: Path, key: str | None = None) -> np.ndarray:
    """The array in a .npy, or the one named key (the only one) in a .npz.

    Raises:
      ValueError: the array can't be named; the message starts with the file's name.
      Exception: whatever zip, zlib and NumPy raise of damaged files.
    """
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            return _array(file, path.stat().st_size)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        member = members[_key(path, list(members), key)]
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"its compression, {member.compress_type}, is not one that NumPy writes")
        if member.file_size > _MOST_SMALLER * member.compress_size:
            raise ValueError(f"{member.compress_size} bytes claim to hold {member.file_size}")
        with archive.open(member) as file:
            return _array(file, member.file_size)


def _array(file: IO[bytes], size: int) -> np.ndarray:
    """The array that fills a file of so many bytes."""
    version = np.lib.format.read_magic(file)
    read_header = {1: np.lib.format.read_array_header_1_0}.get(version[0], np.lib.format.read_array_header_2_0)
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: they may run code; save an array of floats")
    if any(axis < 0 for axis in shape):
        raise ValueError(f"the header claims shape {shape}")
    wanted, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if wanted != there:
        raise ValueError(f"the header claims {wanted} bytes of numbers, and there are {there}")
    data = file.read(wanted)
    if len(data) != wanted:
        raise ValueError(f"the header claims {wanted} bytes of numbers, and there are {len(data)}")
    return np.frombuffer(bytearray(data), dtype).reshape(shape, order="F" if fortran else "C")


def _key(path: Path, names: list[str], key: str | None) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key is None:
        raise ValueError(f"{path}: holds {len(names)} arrays ({', '.join(names)}); name one with key")
    if key not in names:
        raise ValueError(f"{path}: there is no array {key!r}; it has {', '.join(map(repr, names))}")
    return key
