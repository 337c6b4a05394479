"""The paper's cost analysis held against measurement, on one device: FLOPs, memory, time."""

from .claims import Claim
from .figure import draw_roofline
from .measurement import measure
from .profile import Profile
from .roofs import Roofs, measure_roofs
from .trace import write_trace

__all__ = ["Claim", "Profile", "Roofs", "draw_roofline", "measure", "measure_roofs", "write_trace"]
