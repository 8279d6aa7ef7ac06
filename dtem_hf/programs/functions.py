"""Functions that a user names on the command line. Programs run no other code from outside."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import BadValue


def load_function(option: str, name: str) -> Callable[..., Any]:
    """The function that `module:function` names. The module may also be in the current folder.

    Raises ValueError that names the option and says which part of the name is wrong.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise BadValue(option, name, "module:function")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise BadValue(
            option, name, f"a module that can be imported; {module_name}: {type(error).__name__}: {error}"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        offered = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise BadValue(option, name, f"a function of {module_name}, which has {', '.join(offered) or 'none'}")
    return function
