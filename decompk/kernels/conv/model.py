"""The model of a GPU until it is tuned: how long a launch takes whose programs all do the same. Nothing is measured.

A multiprocessor holds some CTAs at once, so programs run in waves. A wave takes as long as what it moves and multiplies
at the device's rates, or as one of its programs would take alone, whichever is longest: with few CTAs on a
multiprocessor nothing hides the wait for memory, and a last wave of few programs takes as long as a full one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..device import Device
from ..problem import cdiv

LAUNCH_MS = 0.0025  # of a kernel in a captured graph
LATENCY_MS = 0.0006  # from a load to its use; public pointer chases: 0.3 µs to L2, 0.5 to memory, 0.1 more of TMA
ISSUED = 6.8e6  # instructions of warps a millisecond and multiprocessor: four a clock of 1.7 GHz


@dataclass(frozen=True)
class Work:
    """One launch of `programs` alike; bytes and FLOPs are those of all of them."""

    programs: int
    ctas: int  # that a multiprocessor holds at once
    memory_bytes: float
    l2_bytes: float  # what programs load
    step_bytes: float  # of one program's loads, what is under way at once
    flops: float
    tflops: float  # the device's rate of them
    sum_bytes: float = 0.0  # float32 sums added to or stored in L2, and read again
    instructions: float = 0.0  # of one program's warps, for moments

    def waves(self, device: Device) -> float:
        return self.programs / (device.processors * self.ctas)

    def run(self, device: Device) -> tuple[float, dict[str, float]]:
        """Milliseconds, and those that each bound would take alone, by its name."""
        full, rest = divmod(self.programs, device.processors * self.ctas)
        ms, bounds = 0.0, dict.fromkeys(("memory", "L2", "sums", "arithmetic", "moments", "latency"), 0.0)
        for count, programs in ((full, device.processors * self.ctas), (1, rest)):
            if count and programs:
                wave = self._wave(programs, device)
                ms += count * max(*wave.values(), wave["L2"] + wave["sums"], wave["arithmetic"] + wave["moments"])
                bounds = {name: bounds[name] + count * wave[name] for name in bounds}
        return ms, bounds

    def _wave(self, programs: int, device: Device) -> dict[str, float]:
        """Milliseconds of each bound for so many programs at once."""
        share, busiest = programs / self.programs, cdiv(programs, device.processors)
        product = self.flops / self.programs / (self.tflops / device.processors) / 1e9  # of one program
        moments = self.instructions / ISSUED
        turns = max(1.0, self.l2_bytes / self.programs / self.step_bytes)
        return {
            "memory": share * self.memory_bytes / device.memory_gbps / 1e6,
            "L2": share * self.l2_bytes / device.l2_gbps / 1e6,
            "sums": share * 2 * self.sum_bytes / device.l2_gbps / 1e6,
            "arithmetic": busiest * product,
            "moments": busiest * moments,
            "latency": LATENCY_MS + max(turns * LATENCY_MS, product) + moments,
        }
