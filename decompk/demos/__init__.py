"""`decompk demo --network …`: the method on every kind of network of section 2.4, from data to figures."""

from .demo import run
from .kinds import DEMOS, Demo

__all__ = ["DEMOS", "Demo", "run"]
