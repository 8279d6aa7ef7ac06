"""Import every module of a package, so that a new file in it is all that a new backbone or method needs."""

import importlib
import pkgutil
from types import ModuleType


def import_all(package: ModuleType) -> None:
    """Import the direct submodules of a package, in alphabetical order."""
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        importlib.import_module(f"{package.__name__}.{module}")
