"""Faults of workers: they are killed, freeze, join and leave."""

from __future__ import annotations

from tests.faults.fault import WORKER_DEATH_SECONDS, Fault
from tests.faults.harness import Harness
from tests.faults.monitor import Observation

MEMBERS_MIN, MEMBERS_MAX = 1, 4
WAKE_LIMIT_SECONDS = 120.0


class Sigkill(Fault):
    """Killed workers; half of the deaths come during the recovery from the one before."""

    name = "sigkill"
    what = "SIGKILL to a worker at random moments, 50 times"
    ready_within = WORKER_DEATH_SECONDS

    async def disturb(self, harness: Harness) -> None:
        deaths = harness.times(50, least=2)
        was_complete = True
        for death in deaths:
            harness.fraction = death / len(deaths)
            await harness.run_for(0.0, 3.0)
            await harness.pool.kill(harness.any_worker())
            mark = await harness.mark()
            if death != deaths[-1] and harness.random.random() < 0.5:
                await harness.run_for(0.2, 8.0)
                was_complete = False
            else:
                await harness.recover(mark, measured=was_complete)
                await harness.monitor.until(
                    _is_complete, "the new worker to be ready", WAKE_LIMIT_SECONDS
                )
                was_complete = True


class Zombie(Fault):
    """A zombie: it wakes up after the others took its partitions and still believes in them."""

    name = "zombie"
    what = "SIGSTOP to a worker for longer than the session timeout, then SIGCONT, 5 times"
    ready_within = WORKER_DEATH_SECONDS
    leaves_zombies = True
    rate = 6_000.0
    """Rate at which the zombie has computed scores that it has not published."""

    async def disturb(self, harness: Harness) -> None:
        sleeps = harness.times(5, least=2)
        for sleep in sleeps:
            harness.fraction = sleep / len(sleeps)
            await harness.run_for(1.0, 3.0)
            zombie = harness.any_worker()
            harness.pool.freeze(zombie)
            mark = await harness.mark()
            await harness.recover(mark)
            await harness.run_for(1.0, 3.0)
            harness.pool.thaw(zombie)
            await harness.monitor.until(
                _is_complete, "the woken worker to be ready", WAKE_LIMIT_SECONDS
            )

    async def check(self, harness: Harness) -> list[str]:
        zombie_scores = await harness.pool.samples("recur_zombie_scores_total")
        harness.notes.append(f"{zombie_scores:,.0f} zombie scores were counted")
        return []


def _is_complete(sample: Observation) -> bool:
    return not sample.not_ready and sample.lag is not None


class JoinAndLeave(Fault):
    """Joining and leaving workers; each change comes before the group is stable again."""

    name = "join-leave"
    what = "workers join and leave (SIGTERM) every few seconds, 15 times, one to four of them"
    workers = 2

    async def disturb(self, harness: Harness) -> None:
        changes = harness.times(15, least=3)
        for change in changes:
            harness.fraction = change / len(changes)
            await harness.run_for(1.0, 5.0)
            members = len(harness.pool.members)
            leaves = harness.random.random() < 0.5
            if members >= MEMBERS_MAX or (leaves and members > MEMBERS_MIN):
                harness.pool.leave(harness.any_worker())
            else:
                await harness.pool.join()
        await harness.recover(await harness.mark())
