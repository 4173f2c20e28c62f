"""The bench: a broker and a Redis, on which one contender runs at a time."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from benchmarks.peers.batch_scorer import PeerSettings
from benchmarks.peers.environment import ROOT, missing, peers_python
from benchmarks.results import Results
from benchmarks.traffic import blocks
from model.checkpoint import Checkpoint, CheckpointThresholds, Header
from model.features.account import ACCOUNT_FEATURES
from model.features.spec import FeatureSpec
from model.network import Network
from pipeline.checkpoint import load_checkpoint
from pipeline.kafka.score_log import KafkaScoreLog
from pipeline.kafka.topics import admin_client, ensure_topics
from pipeline.local.embedded import Services
from pipeline.local.supervisor import SupervisedProcess
from pipeline.local.workers import WorkerProcess, start_worker, until_ready
from pipeline.replay.producer import Block
from pipeline.settings import Settings, load_settings
from pipeline.timestamps import ANY_AGE_SECONDS

READY_SECONDS = 120.0
SAMPLE_SECONDS = 0.25

BATCH_RECORDS = 2048
"""Most records of a batch, for all: Recur's default."""
LARGE_BATCH_RECORDS = 10_000
"""A size at which an account pays several times in a batch and its state moves once for all."""

RECUR = "Recur"
FAUST_EVENT, FAUST_TAKE = "stock Faust, event", "stock Faust, take"
BYTEWAX = "Bytewax"
BYTEWAX_LARGE = f"Bytewax, batches of {LARGE_BATCH_RECORDS:,}"
QUIX = "Quix Streams"
QUIX_PROMPT = "Quix Streams, short checkpoints"

_FAUST = ["-m", "benchmarks.peers.stock_faust", "worker", "-l", "warn"]
_BYTEWAX = ["-m", "bytewax.run"]
_QUIX = ["-m", "benchmarks.peers.quix_job", str(BATCH_RECORDS)]
PEERS: dict[str, list[str]] = {
    FAUST_EVENT: _FAUST,
    FAUST_TAKE: _FAUST,
    BYTEWAX: [*_BYTEWAX, f"benchmarks.peers.bytewax_job:flow({BATCH_RECORDS})"],
    BYTEWAX_LARGE: [*_BYTEWAX, f"benchmarks.peers.bytewax_job:flow({LARGE_BATCH_RECORDS})"],
    QUIX: [*_QUIX, "1.0"],
    QUIX_PROMPT: [*_QUIX, "0.003"],
}
"""Arguments of Python by the name of a peer. Quix Streams needs a checkpoint a second for its
throughput, and one every 3 ms for its latency: 1 ms is no faster and fails at 5,000/s."""

MODULES = {
    BYTEWAX: "bytewax.connectors.kafka",
    BYTEWAX_LARGE: "bytewax.connectors.kafka",
    QUIX: "quixstreams",
    QUIX_PROMPT: "quixstreams",
}
"""Module that a peer needs from the peers' environment."""


@dataclass
class Contender:
    """A process that scores.

    Attributes:
        worker: its metrics too, if it is Recur.
    """

    name: str
    process: SupervisedProcess
    log_path: Path
    worker: WorkerProcess | None = None

    def check(self) -> None:
        """End the benchmark if the process has ended."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-12:])
            raise SystemExit(f"{self.name} ended early:\n{tail}")

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its threads so far, user and system."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)


class Bench:
    """Bench with a broker, a Redis, and one contender at a time.

    Attributes:
        results: rows of the table.
        accounts_checkpoint: network of the shipped size that sees account features only.
        generated: whether the shipped generator makes the payments, not the simulator.
    """

    def __init__(self, services: Services, directory: Path, *, generated: bool = False) -> None:
        self.services = services
        self.generated = generated
        self.directory = directory
        self.results = Results()
        self.accounts_checkpoint = directory / "accounts.safetensors"
        accounts_only(load_checkpoint(load_settings())).save(self.accounts_checkpoint)
        self._number = itertools.count(1)

    def settings(self, **changes: Any) -> Settings:
        """Make settings with separate topics, group and keys for a measurement."""
        name = uuid.uuid4().hex[:6]
        return load_settings(
            kafka_bootstrap_servers=self.services.kafka_bootstrap_servers,
            redis_url=self.services.redis_url,
            topic_prefix=f"{name}-",
            redis_key_prefix=f"bench-{name}",
            kafka_group_id=f"bench-{name}",
            max_timestamp_age_seconds=ANY_AGE_SECONDS,
            **changes,
        )

    def payments(self, *, live: bool = False, history: int = 0) -> Iterator[Block]:
        """Make the payments of a measurement; see :func:`benchmarks.traffic.blocks`."""
        return blocks(live=live, history=history, generated=self.generated)

    @asynccontextmanager
    async def recur(self, settings: Settings) -> AsyncIterator[Contender]:
        """Run a worker of Recur."""
        environment = environment_of(settings)
        environment["RECUR_LOG_FORMAT"] = "json"
        worker = start_worker(next(self._number), self.directory, environment)
        try:
            yield Contender(RECUR, worker.process, worker.log_path, worker)
        finally:
            await worker.stop()

    @asynccontextmanager
    async def peer(self, name: str, settings: Settings) -> AsyncIterator[Contender]:
        """Run the job of a peer."""
        job = PeerSettings(
            settings.kafka_bootstrap_servers,
            settings.redis_url,
            settings.kafka_group_id,
            settings.topic("transactions"),
            settings.topic("scores"),
            str(self.accounts_checkpoint),
        )
        environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",  # as in a worker
            **job.environment(),
            "PYTHONPATH": str(ROOT),
            "PEER_MODE": name.rpartition(" ")[2],
        }
        python = str(peers_python()) if name in MODULES else sys.executable
        log_path = self.directory / f"peer-{next(self._number)}.log"
        process = SupervisedProcess(
            [python, *PEERS[name]],
            log_path=log_path,
            directory=self.directory,
            environment=environment,
        )
        try:
            yield Contender(name, process, log_path)
        finally:
            process.kill()

    def run(self, name: str, settings: Settings) -> Any:
        """Run a contender by its name: ``Recur``, or a peer."""
        return self.peer(name, settings) if name in PEERS else self.recur(settings)

    def installed_peers(self) -> list[str]:
        """Name the peers that can run here; tell why the others cannot."""
        errors = {module: missing(module) for module in set(MODULES.values())}
        for module, error in errors.items():
            if error is not None:
                self.results.add(module, f"cannot run here: {error}")
        return [name for name in PEERS if errors.get(MODULES.get(name, "")) is None]


def environment_of(settings: Settings) -> dict[str, str]:
    """Return the variables that give another process of Recur a measurement's settings."""
    names = (
        "kafka_bootstrap_servers",
        "redis_url",
        "topic_prefix",
        "redis_key_prefix",
        "kafka_group_id",
        "checkpoint",
        "processing_guarantee",
        "max_timestamp_age_seconds",
        "review_threshold",
        "decline_threshold",
        "micro_batch_max",
    )
    values = {name: getattr(settings, name) for name in names}
    return {f"RECUR_{k.upper()}": str(v) for k, v in values.items() if v is not None}


def accounts_only(checkpoint: Checkpoint) -> Checkpoint:
    """Make a network of the same size with account features only and random weights."""
    inputs = tuple(i for i in checkpoint.header.features.inputs if i.feature in ACCOUNT_FEATURES)
    features = FeatureSpec(inputs)
    architecture = replace(checkpoint.header.architecture, inputs=len(inputs), roles=features.roles)
    return Checkpoint.of(
        Network(architecture),
        Header(
            architecture=architecture,
            features=features,
            thresholds=CheckpointThresholds(review=1.0, decline=1.0),
        ),
    )


async def make_topics(settings: Settings) -> None:
    """Create the topics; the broker stamps each score when it appends it."""
    await ensure_topics(settings)
    stamped = ConfigResource(
        ConfigResourceType.TOPIC,
        settings.topic("scores"),
        {"message.timestamp.type": "LogAppendTime"},
    )
    async with admin_client(settings) as admin:
        await admin.alter_configs([stamped])


async def start_up(contender: Contender) -> float:
    """Wait until a worker of Recur is ready; return the seconds since now."""
    began = time.monotonic()
    if contender.worker is not None:
        await until_ready([contender.worker], READY_SECONDS)
    return time.monotonic() - began


class Point(NamedTuple):
    """The progress of a contender: scores published, when, and its CPU so far, seconds."""

    scores: float
    at_seconds: float
    cpu_seconds: float


async def published(settings: Settings, count: float, contender: Contender) -> list[Point]:
    """Follow a contender's progress by the records in its scores topic."""
    score_log = KafkaScoreLog(settings)
    await score_log.start()
    points: list[Point] = []
    try:
        while not points or points[-1].scores < count:
            await asyncio.sleep(SAMPLE_SECONDS)
            contender.check()
            ends = await score_log.ends(
                settings.topic("scores"), list(range(settings.topic_partitions))
            )
            done = float(sum(ends.values()))
            if done > (points[-1].scores if points else 0.0):
                points.append(Point(done, time.monotonic(), contender.cpu_seconds()))
    finally:
        await score_log.stop()
    return points


class Steady(NamedTuple):
    """Transactions/s, and CPU in µs of each transaction, without the start-up."""

    rate: float
    cpu_us: float


def steady(points: list[Point], transactions: int, history: int = 0) -> Steady:
    """Compute both from the first tenth of the transactions after the history to the end."""
    begin = next(p for p in points if p.scores >= history + transactions / 10)
    end = points[-1]
    scored = end.scores - begin.scores
    return Steady(
        scored / (end.at_seconds - begin.at_seconds),
        (end.cpu_seconds - begin.cpu_seconds) / scored * 1e6,
    )
