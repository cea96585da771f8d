"""What a command is to work on: a function of the user's, named `FILE.py:NAME`."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardtrain.errors import ModelError, suggest

FORM = "FILE.py:NAME, a function that returns (model, loss_fn, optimizer, batch)"


def load_problem(text: str) -> tuple[Any, Callable[..., Any], Any, Any]:
    """Call the function `NAME` of `FILE.py`: what it returns are the first arguments of `st.plan`.

    Args:
      text: `FILE.py:NAME`; the file's own folder can be imported from, as when it is run.

    Raises:
      ModelError: No such file or function, or it returns something else.
    """
    file, colon, name = text.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ModelError(f"{text!r} is not of the form {FORM}")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ModelError(f"no such file: {file} (from {Path.cwd()})")
    function = getattr(_module(path), name, None)
    if not callable(function):
        functions = [n for n, v in vars(_module(path)).items() if callable(v) and n[0] != "_"]
        raise ModelError(f"{file} has no function {name!r}: {suggest(name, functions)}")
    found = function()
    if not isinstance(found, tuple) or len(found) != 4:
        shown = f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__
        raise ModelError(f"{text} returned {shown}, not (model, loss_fn, optimizer, batch)")
    return found


def _module(path: Path) -> Any:
    name = f"shardtrain_problem_{path.stem}"
    if name in sys.modules and Path(str(sys.modules[name].__file__)) == path.resolve():
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.resolve().parent) not in sys.path:
        sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
