"""Packages that only some commands need."""

import importlib.util


def require_packages(what: str, packages: tuple[str, ...], extra: str) -> None:
    """Raise ImportError, with the command that installs them, unless all ``packages`` are installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{what} needs {' and '.join(missing)}: pip install 'slowfast-ext[{extra}]'")
