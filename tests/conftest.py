"""The broker and the Redis that all tests of a session share."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.local.kafka import Kafka
from pipeline.local.redis import Redis, RedisCluster
from pipeline.local.service import Service

# Before NumPy and torch are imported, here and in every process that a test starts: threads that
# wait for each other crawl where several processes share two cores.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# An environment that forbids bytecode has each worker compile all of torch and Faust at its
# start: 3 s of a core, more than the rest of it. It goes to a directory of the tests' own then.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    _bytecode = Path(__file__).resolve().parents[1] / ".pytest_cache" / "bytecode"
    os.environ.setdefault("PYTHONPYCACHEPREFIX", str(_bytecode))
    sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"]
    sys.dont_write_bytecode = False

# A shell has what it runs in the background ignore SIGINT, and so would the workers of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code.
settings.register_profile("recur", deadline=None)
settings.load_profile("recur")

SERVICES = {"kafka", "redis_server", "redis_cluster", "broker", "site"}
"""Fixtures whose tests are live; the last two are those of single files."""

SLOW_SECONDS = 2.0
"""A test that takes longer is marked slow; see the end of a run."""

FORECAST_UPDATES = 20
FORECAST_SAMPLES = 4
MERCHANT_WEIGHT_UPDATES = 500

_running: list[pytest.Item] = []


def pytest_configure(config: pytest.Config) -> None:
    """Let processes take up files in the order below, not by how many tests they have."""
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist
        config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark who asks for a service; where several processes run, begin with the longest files."""
    long_tests: Counter[Path] = Counter()
    for item in items:
        if SERVICES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.live)
        long_tests[item.path] += any(item.get_closest_marker(name) for name in ("live", "slow"))
    if config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
        items.sort(key=lambda item: -long_tests[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Know which test runs."""
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()


@pytest.fixture(autouse=True, scope="session")
def _only_live_tests_have_services() -> Iterator[None]:
    """Refuse a service to a test that `make test-fast` would run."""
    wait_until_ready = Service.wait_until_ready

    def wait_for_live_tests(service: Service) -> None:
        if _running and _running[-1].get_closest_marker("live") is None:
            pytest.fail(f"{_running[-1].name} starts {service.name}: mark it live", pytrace=False)
        wait_until_ready(service)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Service, "wait_until_ready", wait_for_live_tests)
        yield


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Use one thread, because threads that wait for each other are slow on a busy machine."""
    from model.torch_threads import one_thread  # here, as torch takes seconds

    with one_thread():
        yield


@pytest.fixture(scope="module")
def few_updates_of_merchant_weight() -> Iterator[None]:
    """Shorten trainings on little data, which the usual updates would dominate."""
    from model.evaluation import forecast_baselines, forecast_following  # here: torch takes seconds
    from model.training import forecast_head, merchant_weight_fit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merchant_weight_fit, "UPDATES", MERCHANT_WEIGHT_UPDATES)
        patch.setattr(forecast_head, "UPDATES", FORECAST_UPDATES)
        patch.setattr(forecast_head, "SAMPLES_FOR_ACCOUNT", FORECAST_SAMPLES)
        patch.setattr(forecast_following, "ACCOUNTS", FORECAST_SAMPLES)
        patch.setattr(forecast_baselines, "TREES", FORECAST_SAMPLES)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name tests that take long and do not say so; how long says no more than that."""
    seconds: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        if "slow" not in report.keywords and "live" not in report.keywords:
            seconds[report.nodeid] += report.duration
    told = [f"{took:.1f} s {name}" for name, took in seconds.most_common() if took > SLOW_SECONDS]
    if told:
        terminalreporter.section("slow on this machine, and not marked so")
        for line in told:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """A broker for tests that keep to topics and groups of their own and leave it running."""
    with Kafka() as broker:
        yield broker


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A Redis for tests that keep to keys of their own, or flush it, and leave it running."""
    with Redis() as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster() -> Iterator[RedisCluster]:
    """Three nodes, for tests that keep to keys of their own and leave them running."""
    with RedisCluster() as cluster:
        yield cluster
