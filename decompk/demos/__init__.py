"""`decompk demo --network …`: the method on every kind of network of section 2.4, from data to figures."""

from .kinds import DEMOS, Demo
from .run import run

__all__ = ["DEMOS", "Demo", "run"]
