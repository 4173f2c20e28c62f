"""The commands `recur state ...` on a real broker and Redis, with running workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from model.features.merchant import BUCKET_MS
from model.transaction import Transaction
from pipeline.admin import rebuild_merchants as rebuild_merchants_module
from pipeline.admin.forget import forget_lines
from pipeline.admin.rebuild_merchants import rebuild_merchants_lines
from pipeline.admin.rebuild_states import rebuild_lines
from pipeline.admin.repartition import partition_of, repartition_lines
from pipeline.cli.main import recur
from pipeline.errors import RecurError, SettingsError, StartupError
from pipeline.kafka.topics import add_partitions
from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis
from pipeline.replay.labels import encode_labels
from pipeline.replay.producer import Feed
from pipeline.scoring.watermark_check import check_watermark
from pipeline.storage.client import redis_client
from pipeline.storage.keys import MERCHANT_SLOTS, Keys, MerchantKeys
from pipeline.storage.merchant_profile import FIXED_BYTES, Profile
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.state_scan import StateScan
from tests.fakes.running_pipeline import (
    EVENT_TIME_MS,
    PipelineUnderTest,
    assert_scored_once,
    transactions,
    until,
)


@pytest.fixture
def system(kafka: Kafka, redis_server: Redis, tmp_path: Path) -> PipelineUnderTest:
    return PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path)


def quiet() -> Console:
    return Console(file=StringIO())


async def forget(
    system: PipelineUnderTest, account: str, *, dry_run: bool = False, wait: float = 60.0
) -> tuple[str, bool]:
    lines, done = await forget_lines(
        system.settings, account, dry_run=dry_run, wait_seconds=wait, console=quiet()
    )
    return "\n".join(lines), done


async def rebuild(
    system: PipelineUnderTest, partitions: list[int] | None = None, **options: bool
) -> str:
    lines = await rebuild_lines(
        system.settings,
        partitions,
        **{"dry_run": False, "wait": True} | options,
        console=quiet(),
    )
    return "\n".join(lines)


def keys_of(system: PipelineUnderTest) -> Keys:
    settings = system.settings
    return Keys(
        settings.redis_key_prefix, system.scorer.checkpoint.digest, settings.topic("transactions")
    )


async def all_states(system: PipelineUnderTest) -> dict[str, int]:
    """Return each account's partition."""
    found: dict[str, int] = {}
    async with StateScan(system.settings) as scan:
        async for partition, accounts in scan.accounts(keys_of(system).model):
            found |= dict.fromkeys(accounts, partition)
    return found


async def damage(system: PipelineUnderTest, how: dict[str, bytes | None]) -> None:
    """Overwrite accounts' states in Redis, or delete them."""
    partitions = await all_states(system)
    client = redis_client(system.settings)
    for account, value in how.items():
        (key,) = keys_of(system).accounts(partitions[account], [account])
        await (client.delete(key) if value is None else client.set(key, value))
    await client.aclose()


def test_an_account_is_forgotten_while_workers_run_and_stays_forgotten_in_a_replay(
    system: PipelineUnderTest,
) -> None:
    sent = transactions(3_000, accounts=40)
    account, other = sent[0].account_id, sent[1].account_id

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(sent)
            await system.until_applied()
            before = await all_states(system)

            output, done = await forget(system, account, dry_run=True)
            assert done
            assert "would be forgotten; nothing is done" in output
            assert await all_states(system) == before
            assert len(await system.records("transactions")) == len(sent)

            output, done = await forget(system, account)

            assert done
            topic = system.settings.topic("transactions")
            assert f"account {account} is forgotten" in output
            assert f"{topic}-{before[account]}, offset" in output
            assert "its state in Redis, 400 bytes" in output
            for role in ("transactions", "scores", "alerts", "labels", "dead-letter"):
                assert role in output
            assert (await all_states(system)).keys() == before.keys() - {account}
            assert await metric(system, "recur_accounts_forgotten_total") == 1.0

            more = transactions(400, accounts=40, seed=1)
            await system.send(more)
            await system.until_applied()
            assert (await all_states(system)).keys() == before.keys()
            await system.assert_states_are_the_log()

            output, done = await forget(system, other)
            assert done
            await rebuild(system)
            assert (await all_states(system)).keys() == before.keys() - {other}
            await system.assert_states_are_the_log()
            assert_scored_once(await system.scores(), [*sent, *more])
            assert not await system.records("dead_letter")
            log = "".join(path.read_text() for path in system.directory.glob("*.log"))
            assert account not in log

    asyncio.run(run())


async def metric(system: PipelineUnderTest, name: str) -> float:
    (worker,) = system.workers
    await worker.refresh()
    return worker.samples[name]


def test_an_unknown_account_is_forgotten_once_a_worker_runs(
    system: PipelineUnderTest,
) -> None:
    """The control record waits in the log; it also erases what is not applied yet."""
    sent = [t for t in transactions(200, accounts=4) if t.account_id == "A000001"]

    async def run() -> None:
        async with system.running(workers=0):
            await system.send(sent)

            output, done = await forget(system, "A000001")

            assert not done
            assert "will be forgotten" in output
            assert "no worker runs" in output
            assert "no state: Redis had none" in output
            await system.start_workers(1)
            await system.until_applied()
            assert not await all_states(system)
            assert_scored_once(await system.scores(), sent)

    asyncio.run(run())


def test_damaged_states_are_rebuilt_while_workers_run_and_no_score_changes(
    system: PipelineUnderTest,
) -> None:
    """No record comes meanwhile, so only the command can start the rebuild.

    Without a worker, the next one to start does it.
    """
    sent = transactions(4_000, accounts=60)
    names = sorted({t.account_id for t in sent})

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(sent)
            await system.until_applied()
            await system.assert_states_are_the_log()
            scores = await records_of_scores(system)
            partitions = await all_states(system)
            damage_by_account = {names[0]: b"junk", names[1]: b"\2" * 400, names[2]: None}

            await damage(system, damage_by_account)
            with pytest.raises(AssertionError):
                await system.assert_states_are_the_log()
            output = await rebuild(system, dry_run=True)
            assert "nothing is done" in output
            assert sum(n for n in counted(output)) >= len(names) - 1

            one = partitions[names[0]]
            output = await rebuild(system, [one])
            assert output.startswith(f"{system.settings.topic('transactions')}-{one}: ")
            assert "computed again" in output
            await rebuild(system)

            await system.assert_states_are_the_log()
            assert await records_of_scores(system) == scores
            assert await all_states(system) == partitions
            with pytest.raises(SettingsError, match="has the partitions 0 to 3, and no 4"):
                await rebuild(system, [4])

            await system.workers[0].stop()
            output = await rebuild(system)
            assert "no worker runs: the states are computed again when one starts" in output
            assert not await all_states(system), "all lie past the watermark"
            await system.start_workers(1)
            await system.until_applied()
            await system.assert_states_are_the_log()
            assert await records_of_scores(system) == scores

    asyncio.run(run())


def counted(output: str) -> list[int]:
    """Read the number of states from each line of a partition."""
    lines = [line for line in output.splitlines() if line.endswith(" states")]
    return [int(line.rsplit(", ", 1)[1].split()[0].replace(",", "")) for line in lines]


async def records_of_scores(system: PipelineUnderTest) -> Counter[tuple[Any, Any]]:
    return Counter((record.key, record.value) for record in await system.records("scores"))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["rebuild"], "takes --partition N, --all or --merchants"),
        (["rebuild", "--all", "--partition", "1"], "takes --partition N, --all or --merchants"),
        (["rebuild", "--all", "--merchants"], "takes --partition N, --all or --merchants"),
        (["rekey", "--dry-run"], "run `recur state repartition`"),
        (["forget", ""], "an account id has 1 to 256 characters"),
        (["forget", "x" * 257], "an account id has 1 to 256 characters"),
    ],
)
def test_wrong_arguments_end_with_one_line(arguments: list[str], problem: str) -> None:
    result = CliRunner().invoke(recur, ["state", *arguments])

    assert isinstance(result.exception, RecurError)
    assert problem in str(result.exception)


async def repartition(system: PipelineUnderTest, **options: bool) -> str:
    lines = await repartition_lines(
        system.settings,
        **{"dry_run": False, "accept_stranded": False} | options,
        console=quiet(),
    )
    return "\n".join(lines)


async def counts_of_states(system: PipelineUnderTest) -> dict[str, int]:
    """Return the number of transactions in each account's state."""
    partitions = await all_states(system)
    client = redis_client(system.settings)
    keys = [keys_of(system).accounts(partitions[name], [name])[0] for name in partitions]
    states, loaded, _ = system.scorer.codec.decode(await client.mget(keys))
    await client.aclose()
    assert loaded.all()
    return dict(zip(partitions, states.history.count.tolist(), strict=True))


def test_states_move_with_their_accounts_when_the_topic_gets_more_partitions(
    kafka: Kafka, redis_server: Redis, tmp_path: Path
) -> None:
    """Each account continues with its state in its new partition."""
    system = PipelineUnderTest(kafka.bootstrap, redis_server.url, tmp_path, topic_partitions=2)
    sent = transactions(1_500, accounts=40)
    more = transactions(600, accounts=40, seed=1)

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(sent)
            await system.until_applied()
            before = await all_states(system)
            assert "nothing to move" in await repartition(system)

            await add_partitions(system.settings, system.settings.topic("transactions"), 5)
            with pytest.raises(RecurError, match=r"1 workers of group .* are running"):
                await repartition(system)
            await system.workers[0].stop()
            system.use(topic_partitions=5)
            marks = await system.watermarks()
            with pytest.raises(StartupError, match="recur state repartition"):
                check_watermark("transactions", 0, marks[0], 5, 10_000)
            moving = {a for a, p in before.items() if partition_of(a.encode(), 5) != p}
            assert 0 < len(moving) < len(before)
            output = await repartition(system, dry_run=True)
            assert f"{len(moving)} states would move, {len(before) - len(moving)} stay" in output
            assert await all_states(system) == before

            stranded = next(t for t in more if t.account_id in moving)
            await system.send_to(before[stranded.account_id], stranded)
            with pytest.raises(RecurError, match="1 records of accounts that move"):
                await repartition(system)
            assert await all_states(system) == before

            output = await repartition(system, accept_stranded=True)

            assert f"{len(moving)} states moved" in output
            assert "got 5 partitions" in output
            after = await all_states(system)
            assert after == {a: partition_of(a.encode(), 5) for a in before}
            assert "nothing to move" in await repartition(system)
            rest = [t for t in more if t is not stranded]
            await system.send_compressed(rest, "gzip")  # a producer that knows all partitions
            await system.start_workers(1)
            await system.until_applied()
            seen = Counter(t.account_id for t in [*sent, *rest])
            counts = await counts_of_states(system)
            del seen[stranded.account_id], counts[stranded.account_id]
            assert counts == seen
            assert_scored_once(await system.scores(), [*sent, *more])

    asyncio.run(run())


async def rebuild_merchants(system: PipelineUnderTest, *, dry_run: bool = False) -> str:
    lines = await rebuild_merchants_lines(system.settings, dry_run=dry_run, console=quiet())
    return "\n".join(lines)


RIGHT = "counts of 0 profiles corrected: 0 transactions were missing, 0 too many"


def test_profiles_are_corrected_to_what_the_log_says_while_workers_count(
    system: PipelineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrects missing, doubled and damaged counts; keeps what workers count meanwhile."""
    monkeypatch.setattr(rebuild_merchants_module, "SETTLE_SECONDS", 0.3)
    sent = transactions(4_000, accounts=60)
    more = transactions(3_000, accounts=60, seed=1)

    async def run() -> None:
        async with system.running(workers=1):
            await system.send(sent)
            async with Feed(system.settings, "labels") as feed:
                await feed.send(*labels_of(sent[:200]))
            await system.until_applied()
            keys = MerchantKeys(system.settings.redis_key_prefix)
            client = redis_client(system.settings)
            store = RedisMerchantStore.from_settings(system.settings)
            names = sorted({t.merchant_id for t in sent})

            async def all_recorded() -> bool:
                found = [Profile.from_bytes(v) for v in await store.load(names) if v]
                return sum(len(profile.frauds) for profile in found) == 200

            await until(all_recorded, "the labels to be recorded")
            output = await rebuild_merchants(system)
            assert f"{len(names)} merchants in the log" in output
            assert RIGHT in output
            assert "known frauds of 0 profiles corrected" in output
            right = await store.load(names)

            labelled = [t.merchant_id for t in sent[:200]]
            await client.delete(keys.profile(labelled[0]))
            await client.set(keys.profile(labelled[1]), b"\1junk")
            bucket = EVENT_TIME_MS // BUCKET_MS
            await store.add({bucket: {labelled[2]: 7}}, [])
            value = await client.get(keys.profile(labelled[3]))
            await client.set(keys.profile(labelled[3]), value[:FIXED_BYTES])
            damaged = await store.load(names)
            output = await rebuild_merchants(system, dry_run=True)
            assert "counts of 3 profiles would be corrected" in output
            assert "7 too many" in output
            assert "known frauds of 3 profiles would be corrected" in output
            assert await store.load(names) == damaged

            sending = asyncio.create_task(system.send(more, rate=1_000))
            output = await rebuild_merchants(system)
            await sending
            await system.until_applied()

            assert "counts of 3 profiles corrected" in output
            await rebuild_merchants(system)  # corrects what came during the last round
            assert RIGHT in await rebuild_merchants(system)
            counts = Counter(t.merchant_id for t in [*sent, *more])
            profiles = [Profile.from_bytes(v or b"") for v in await store.load(names)]
            for name, profile, value in zip(names, profiles, right, strict=True):
                assert int(profile.counts.sum()) == counts[name]
                assert profile.frauds == Profile.from_bytes(value or b"").frauds

            gone = [keys.profile(name) for name in names]
            gone += [
                keys.labels_watermark(slot, system.settings.topic("labels"), partition)
                for slot in range(MERCHANT_SLOTS)
                for partition in range(4)
            ]
            await client.delete(*gone)
            await until(all_recorded, "the worker to notice that Redis lost the labels")
            assert [
                Profile.from_bytes(value).frauds if value else []
                for value in await store.load(names)
            ] == [profile.frauds for profile in profiles]
            await rebuild_merchants(system)
            assert RIGHT in await rebuild_merchants(system)
            await store.close()
            await client.aclose()

    asyncio.run(run())


def labels_of(labelled: list[Transaction]) -> tuple[Any, Any]:
    times = np.array([t.timestamp for t in labelled], np.int64)
    block = encode_labels(
        [t.transaction_id for t in labelled],
        [t.account_id for t in labelled],
        [t.merchant_id for t in labelled],
        np.ones(len(labelled), bool),
        times,
        times + 86_400_000,
        "test",
    )
    return block.keys, block.values
