"""Where commands keep their compiled programs: what a command has compiled once, the next one reads.

JAX writes and reads them. Executables are what they are, so the folder is the user's alone, and there is one for each set of
versions and each kind of processor: a home directory may serve many machines.
"""

import contextlib
import hashlib
import os
import platform
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import platformdirs

from coupled_gmm.core import installation

_MOST_BYTES = 2**30
_QUICKLY = 0.1  # seconds; what compiles in less is not kept
_MONTHS = 90 * 24 * 3600  # seconds; folders that nobody has used for so long go
_CPU = Path("/proc/cpuinfo")


def keep_programs() -> None:
    """From now on JAX keeps this process's programs; not where the user has chosen how it does, nor where there is no room."""
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return
    with contextlib.suppress(OSError):
        folder = _private(_home() / _kind())
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _QUICKLY)
        _forget_old_ones(folder)


def _home() -> Path:
    return Path(platformdirs.user_cache_dir("coupled_gmm", appauthor=False)) / "programs"


def _kind() -> str:
    """Of programs: those of other versions, or of another processor, are of no use."""
    versions = jax.__version__, jaxlib.version.__version__, installation.version()
    return hashlib.sha256(repr((versions, platform.machine(), _processor())).encode()).hexdigest()[:16]


def _processor() -> str:
    """Its name and what it can do."""
    try:
        lines = _CPU.read_text().splitlines()
    except OSError:
        return platform.processor()
    told = (line.partition(":") for line in lines)
    return repr(sorted({value for name, _, value in told if name.strip() in ("model name", "flags", "Features")}))


def _private(folder: Path) -> Path:
    """The folder, made if need be, that nobody else can write into or look into.

    Raises:
      OSError: it can't be made, or it is somebody else's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in (folder.parent, folder):
        found = place.lstat()
        if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
            raise OSError(f"{place}: is not a folder of this user's")
        place.chmod(0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder}: can't be written into")
    return folder


def _forget_old_ones(folder: Path) -> None:
    os.utime(folder)
    for other in folder.parent.iterdir():
        if other.stat().st_mtime < time.time() - _MONTHS:
            shutil.rmtree(other, ignore_errors=True)
