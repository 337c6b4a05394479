"""Imports that a user's machine or code decides: one sentence for what is missing, misfits this torch, or is broken."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType

import torch

from ..errors import DecompkError, brief

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def imported(name: str, missing: str) -> ModuleType:
    """The module `name`.

    Raises DecompkError: `missing`, a sentence without its full stop, where there is no such module; where there is one
    that cannot be imported, why.
    """
    if not name or name.startswith("."):
        raise DecompkError(f"{missing}.")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a module may raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            sentence = missing
        elif not (sentence := why_torchvision(error)):
            absent = isinstance(error, ModuleNotFoundError) and name.startswith(f"{error.name}.")
            sentence = missing if absent else f"the module '{name}' cannot be imported: {what_failed(error)}; repair it"
        raise DecompkError(f"{sentence}.") from error


def why_torchvision(error: BaseException) -> str | None:
    """A sentence without its full stop where `error` comes from an import of torchvision, None where it does not."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
        return "torchvision is needed and not installed: pip install torchvision"
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    if not any(str(frame.f_globals.get("__name__")).partition(".")[0] == "torchvision" for frame in frames):
        return None
    what = f"torchvision {_torchvision_version()} is installed but cannot be imported beside torch {torch.__version__}"
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] not in ("torch", "torchvision"):
        return f"{what}, as it needs {error.name}: install that"
    plain, *_ = torch.__version__.partition("+")
    build = importlib.metadata.version("torch").partition("+")[2]
    index = f", both from the index of {build} builds" if build else ""
    return (
        f"{what}, as it is built for another torch ({brief(error)}); install the one that belongs to this torch: "
        f"pip uninstall torchvision, then pip install torchvision torch=={plain}{index}"
    )


def what_failed(error: BaseException) -> str:
    """The error's type, its first line, and where in code of the user's own it was raised."""
    said = f"{type(error).__name__}: {brief(error)}" if str(error).strip() else type(error).__name__
    here = ("<", str(Path(__file__).parents[1]), *LIBRARIES)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(here)]
    if isinstance(error, SyntaxError) or not own:  # a SyntaxError names its line itself
        return said
    return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno})"


def _torchvision_version() -> str:
    """With the build, as in 0.28.0+cu130, which only torchvision's own file says."""
    found = importlib.util.find_spec("torchvision")
    file = Path(found.origin).with_name("version.py") if found and found.origin else None
    said = re.search(r"__version__ = ['\"](.+?)['\"]", file.read_text()) if file and file.exists() else None
    return said[1] if said else importlib.metadata.version("torchvision")
