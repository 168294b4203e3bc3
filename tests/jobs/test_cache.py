"""The cache of compiled programs that commands turn on: the user's alone, bounded, and theirs to refuse."""

import os
import subprocess
import sys
import time

import jax
import pytest

from coupled_gmm.jobs import cache

NAMES = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_enable_compilation_cache",
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where the cache would be; JAX's settings as they are for who has set none, and put back."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    monkeypatch.setattr(cache, "_home", lambda: tmp_path / "coupled_gmm" / "programs")
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "coupled_gmm" / "programs"
    for name, value in before.items():
        jax.config.update(name, value)


def chosen():
    return jax.config.jax_compilation_cache_dir


def test_a_folder_for_these_versions_and_this_processor(home, monkeypatch):
    cache.keep_programs()
    (folder,) = home.iterdir()
    assert chosen() == str(folder)
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in (home, folder))
    assert 0 < jax.config.jax_compilation_cache_max_size < 2**31
    here = cache._kind()
    assert folder.name == here == cache._kind()
    monkeypatch.setattr(cache, "_processor", lambda: "another")
    assert cache._kind() != here
    monkeypatch.undo()
    monkeypatch.setattr(jax, "__version__", "0.0")
    assert cache._kind() != here


def test_what_the_user_has_chosen_stays(home):
    jax.config.update("jax_compilation_cache_dir", "/somewhere")
    cache.keep_programs()
    assert chosen() == "/somewhere" and not home.exists()
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    cache.keep_programs()
    assert not chosen() and not home.exists()


def test_a_folder_that_is_open_to_others_is_closed(home):
    home.mkdir(parents=True)
    home.chmod(0o777)
    cache.keep_programs()
    assert home.stat().st_mode & 0o777 == 0o700 and chosen()


@pytest.mark.parametrize("what", ["a file", "a link", "somebody else's", "nowhere"])
def test_no_place_is_no_cache_and_no_error(home, what, tmp_path, monkeypatch):
    home.parent.mkdir()
    if what == "a file":
        home.write_text("mine")
    elif what == "a link":
        (tmp_path / "other").mkdir()
        home.symlink_to(tmp_path / "other")
    elif what == "somebody else's":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        monkeypatch.setattr(cache, "_home", lambda: tmp_path / ("x" * 300))
    cache.keep_programs()
    assert not chosen()
    assert what != "a file" or home.read_text() == "mine"


def test_folders_that_nobody_uses_go(home):
    for name, age in (("old", 100), ("new", 10)):
        (home / name).mkdir(parents=True)
        (home / name / "program").write_text("x")
        os.utime(home / name, 2 * (time.time() - age * 24 * 3600,))
    cache.keep_programs()
    assert {path.name for path in home.iterdir()} == {"new", cache._kind()}


def test_a_processor_that_no_file_describes(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "_CPU", tmp_path / "missing")
    assert len(cache._kind()) == 16


@pytest.mark.slow
def test_a_second_command_compiles_nothing(tmp_path):
    """In processes of their own: the first writes every program that a fit with rows of progress needs."""
    (tmp_path / "a.csv").write_text("\n".join(["x", *map(str, (0.0, 0.5, 1.0, 7.0, 7.5, 8.0))]))
    sections = ('[data]\ncloud0 = "a.csv"\ncloud1 = "a.csv"', "[start]\nn_components = 2\nn_init = 1")
    text = "\n".join((*sections, "[fit]\ntransport_weight = 0.1\nem_steps = 3", "[output]\npictures = false"))
    (tmp_path / "c.toml").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    environment |= {"JAX_EXPLAIN_CACHE_MISSES": "1", "JAX_LOGGING_LEVEL": "DEBUG"}

    def call(out, *options):
        command = [
            sys.executable,
            "-m",
            "coupled_gmm.cli",
            "fit",
            str(tmp_path / "c.toml"),
            "--out",
            str(tmp_path / out),
        ]
        done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = call("none", "--no-cache")
    assert not list(tmp_path.rglob("*-cache")) and "Persistent compilation cache hit" not in said
    said = call("first")
    kept = {path.name for path in tmp_path.rglob("*-cache")}
    assert any(name.startswith("jit__go_on_with_pair") for name in kept)
    said = call("second")
    assert {path.name for path in tmp_path.rglob("*-cache")} == kept
    assert "Persistent compilation cache hit for 'jit__go_on_with_pair'" in said
