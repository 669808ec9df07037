"""`"package.module:attribute"` to the object: how configs name user code (rewards, model and data factories)."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any


def import_object(path: str) -> Any:
    """Import what `"package.module:attribute"` names; the attribute may be dotted (`module:Class.method`).

    The working directory is searched last, so that a user's own file is found by the `fastgrpo` command as it is
    by `python -m fastgrpo`.

    Raises ValueError, in one line: a malformed path; a module that does not exist; a module that fails while it is
    imported (the cause is chained); a missing attribute, with the nearest name the module does have.
    """
    module_name, separator, attribute = path.partition(":")
    if not separator or not module_name or not attribute:
        raise ValueError(f"{path!r}: expected 'package.module:attribute'")
    value: Any = _import_module(path, module_name)
    owner = f"module {module_name!r}"
    for part in attribute.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, [name for name in dir(value) if not name.startswith("__")], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path!r}: {owner} has no attribute {part!r}{hint}")
        value = getattr(value, part)
        owner = f"{part!r} in {module_name!r}"
    return value


def _import_module(path: str, module_name: str) -> Any:
    working_directory = os.getcwd()
    if working_directory not in sys.path and "" not in sys.path:
        sys.path.append(working_directory)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The module itself is missing only if the name that was not found is it or one of its parent packages.
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(f"{path!r}: there is no module {error.name!r}") from error
        raise ValueError(f"{path!r}: importing {module_name!r} failed: {error}") from error
    except Exception as error:
        summary = str(error).splitlines()[0] if str(error) else ""
        raise ValueError(f"{path!r}: importing {module_name!r} failed: {type(error).__name__}: {summary}") from error
