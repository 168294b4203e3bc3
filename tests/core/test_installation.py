"""What is installed, and how it is said of what is not."""

import importlib.metadata
import re

import pytest
from problems import ROOT

import coupled_gmm as cg
from coupled_gmm.core import installation


def test_version(monkeypatch):
    """The distribution's; without one the package works too, and says that it doesn't know."""
    assert cg.__version__ == importlib.metadata.version("coupled_gmm")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert installation.version() == cg.__version__ == "0+unknown"


@pytest.mark.parametrize("file", ["CITATION.cff", "CHANGELOG.md"])
def test_files_beside_the_package_name_its_version(file):
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.search(rf"^(version:|##) {re.escape(version)}$", (ROOT / file).read_text(), re.MULTILINE)
