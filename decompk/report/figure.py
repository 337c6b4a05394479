"""Where every picture of the package begins: an empty figure, and colours that the colour-blind can tell apart."""

from __future__ import annotations

from typing import Any

from ..errors import DecompkError

# Okabe and Ito's.
BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, BLACK, GRAY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000", "#999999",
)  # fmt: skip


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of its own, in inches: pyplot and the backend the user chose stay out of it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DecompkError("pictures are drawn with matplotlib: pip install 'decompk[plot]'.") from error
    return Figure((width, height), dpi=110, layout="constrained")
