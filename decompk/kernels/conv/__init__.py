"""Grouped convolution: every form of it, in the order in which they are asked; see `form.Form`."""

from __future__ import annotations

from typing import Any

from ...errors import BackendError
from .band import Band
from .direct import Direct
from .form import Form
from .grouped import Grouped
from .halo import Halo
from .loop import Loop
from .matmul import Matmul
from .pointer import Pointer
from .tile import Tile
from .winograd import Winograd

FORMS: tuple[Form[Any], ...] = (
    Direct(),
    Winograd(),
    Loop(),
    Grouped(),
    Matmul(),
    Tile(),
    Band(),
    Pointer(),
    Halo("cuda"),
    Halo("emulation"),
)


def named(name: str, backend: str | None = None) -> Form[Any]:
    """The form of that name, of `backend` where one is given; raises BackendError where there is none."""
    for form in FORMS:
        if form.name == name and backend in (None, form.backend):
            return form
    known = ", ".join(dict.fromkeys(form.name for form in FORMS if backend in (None, form.backend)))
    where = f" of backend '{backend}'" if backend else ""
    raise BackendError(f"there is no form '{name}'{where}: choose one of {known or 'those of another backend'}.")
