"""Faults of workers: they are killed, freeze, join and leave."""

from __future__ import annotations

from tests.faults.fault import WORKER_DEATH_SECONDS, Fault
from tests.faults.harness import Rig
from tests.faults.monitor import Sample

MEMBERS_MIN, MEMBERS_MAX = 1, 4
WAKE_LIMIT_SECONDS = 120.0


class Sigkill(Fault):
    """Half of the deaths come while the group still recovers from the one before."""

    name = "sigkill"
    what = "SIGKILL of a worker at random moments, 50 times"
    ready_within = WORKER_DEATH_SECONDS

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        deaths = rig.times(50, least=2)
        was_whole = True
        for death in deaths:
            rig.fraction = death / len(deaths)
            await rig.go_on(0.0, 3.0)
            await rig.crew.kill(rig.any_worker())
            mark = await rig.mark()
            if death != deaths[-1] and rig.random.random() < 0.5:
                await rig.go_on(0.2, 8.0)
                was_whole = False
            else:
                await rig.recover(mark, measured=was_whole)
                await rig.watch.until(_is_whole, "the new worker to be ready", WAKE_LIMIT_SECONDS)
                was_whole = True


class Zombie(Fault):
    """The others take its partitions; then it wakes up, and believes that they are its own."""

    name = "zombie"
    what = "SIGSTOP of a worker for longer than the session time-out, then SIGCONT, 5 times"
    ready_within = WORKER_DEATH_SECONDS
    leaves_zombies = True
    rate = 6_000.0
    """So that the zombie has something computed that it has not published."""

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        sleeps = rig.times(5, least=2)
        for sleep in sleeps:
            rig.fraction = sleep / len(sleeps)
            await rig.go_on(1.0, 3.0)
            zombie = rig.any_worker()
            rig.crew.freeze(zombie)
            mark = await rig.mark()
            await rig.recover(mark)
            await rig.go_on(1.0, 3.0)
            rig.crew.thaw(zombie)
            await rig.watch.until(_is_whole, "the woken worker to be ready", WAKE_LIMIT_SECONDS)

    async def check(self, rig: Rig) -> list[str]:
        """See :class:`Fault`."""
        foreign = await rig.crew.samples("recur_zombie_scores_total")
        rig.notes.append(f"{foreign:,.0f} scores of another worker between a worker's own, noticed")
        return []


def _is_whole(sample: Sample) -> bool:
    return not sample.not_ready and sample.lag is not None


class JoinAndLeave(Fault):
    """Each change comes before the group has settled after the one before."""

    name = "join-leave"
    what = "workers join and leave (SIGTERM) every few seconds, 15 times, one to four of them"
    workers = 2

    async def disturb(self, rig: Rig) -> None:
        """See :class:`Fault`."""
        changes = rig.times(15, least=3)
        for change in changes:
            rig.fraction = change / len(changes)
            await rig.go_on(1.0, 5.0)
            members = len(rig.crew.members)
            leaves = rig.random.random() < 0.5
            if members >= MEMBERS_MAX or (leaves and members > MEMBERS_MIN):
                rig.crew.leave(rig.any_worker())
            else:
                await rig.crew.join()
        await rig.recover(await rig.mark())
