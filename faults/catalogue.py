"""All faults, in the order of the table."""

from __future__ import annotations

from faults.fault import Fault
from faults.of_workers import JoinAndLeave, Sigkill, Zombie

FAULTS: tuple[Fault, ...] = (
    Sigkill(),
    Zombie(),
    JoinAndLeave(),
)
