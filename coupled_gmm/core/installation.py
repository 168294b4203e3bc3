"""What is installed: this package's version."""


def version() -> str:
    """The installed version, "0+unknown" where the package runs from a folder that nobody installed."""
    import importlib.metadata  # slow to import, and only needed here

    try:
        return importlib.metadata.version("coupled_gmm")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
