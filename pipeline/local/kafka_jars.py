"""The jars of the embedded Apache Kafka: pinned, and fetched once by their Maven coordinates.

Their place is ``$XDG_CACHE_HOME/recur`` (``~/.cache/recur``). Runs that start at the same time
wait for each other. The directory of jars appears there only when it is complete and its digest
is right. To fetch from a mirror, name it as the repository ``central`` in jgo's settings.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import ServiceError

KAFKA_VERSION = "4.1.2"
SCALA_VERSION = "2.13"
SLF4J_VERSION = "1.7.36"
"""Version of this Kafka's slf4j-api; the logging backend must have the same."""

JARS = {
    "at.yawk.lz4": "lz4-java:1.10.1",
    "com.dynatrace.hash4j": "hash4j:0.22.0",
    "com.fasterxml.jackson.core": (
        "jackson-annotations:2.19.4 jackson-core:2.19.4 jackson-databind:2.19.4"
    ),
    "com.fasterxml.jackson.dataformat": (
        "jackson-dataformat-csv:2.19.4 jackson-dataformat-yaml:2.19.4"
    ),
    "com.fasterxml.jackson.datatype": "jackson-datatype-jdk8:2.19.4",
    "com.github.ben-manes.caffeine": "caffeine:3.2.0",
    "com.github.luben": "zstd-jni:1.5.6-10",
    "com.google.re2j": "re2j:1.8",
    "com.typesafe.scala-logging": "scala-logging_2.13:3.9.5",
    "com.yammer.metrics": "metrics-core:2.2.0",
    "commons-beanutils": "commons-beanutils:1.11.0",
    "commons-collections": "commons-collections:3.2.2",
    "commons-digester": "commons-digester:2.1",
    "commons-logging": "commons-logging:1.3.5",
    "commons-validator": "commons-validator:1.10.1",
    "net.sf.jopt-simple": "jopt-simple:5.0.4",
    "net.sourceforge.argparse4j": "argparse4j:0.7.0",
    "org.apache.kafka": (
        f"kafka_{SCALA_VERSION}:{KAFKA_VERSION} kafka-clients:{KAFKA_VERSION}"
        f" kafka-coordinator-common:{KAFKA_VERSION} kafka-group-coordinator:{KAFKA_VERSION}"
        f" kafka-group-coordinator-api:{KAFKA_VERSION} kafka-metadata:{KAFKA_VERSION}"
        f" kafka-raft:{KAFKA_VERSION} kafka-server:{KAFKA_VERSION}"
        f" kafka-server-common:{KAFKA_VERSION} kafka-share-coordinator:{KAFKA_VERSION}"
        f" kafka-storage:{KAFKA_VERSION} kafka-storage-api:{KAFKA_VERSION}"
        f" kafka-tools-api:{KAFKA_VERSION} kafka-transaction-coordinator:{KAFKA_VERSION}"
    ),
    "org.apache.logging.log4j": "log4j-api:2.25.3 log4j-core:2.25.3",
    "org.bitbucket.b_c": "jose4j:0.9.6",
    "org.hdrhistogram": "HdrHistogram:2.2.2",
    "org.jspecify": "jspecify:1.0.0",
    "org.pcollections": "pcollections:4.0.2",
    "org.scala-lang": "scala-library:2.13.16 scala-reflect:2.13.16",
    "org.slf4j": f"slf4j-api:{SLF4J_VERSION} slf4j-simple:{SLF4J_VERSION}",
    "org.xerial.snappy": "snappy-java:1.1.10.7",
    "org.yaml": "snakeyaml:2.4",
}
"""Artifacts and versions by group: the result of jgo's resolution, pinned here.

It resolved ``org.apache.kafka:kafka_2.13`` and ``org.slf4j:slf4j-simple``. The list saves the
fetching of POMs and keeps every version fixed. For another version of Kafka, enter the result of
``jgo.resolve``, and the digest that the error then names.
"""

JARS_SHA256 = "92aab136fc20e69cafef8b2a988eb95336f78e97da4bc92e2099c9abb26d98d7"
"""Digest of the sorted lines ``<file name> <SHA-256 of the file>``, each with a newline."""

JARS_MEGABYTES = 45
FETCH_LIMIT_SECONDS = 600.0
"""Limit for fetching, and for waiting while another run fetches."""

_FETCHES_AT_ONCE = 6
_REQUEST_TIMEOUT_SECONDS = 15


def jar_directory(cache: Path | None = None) -> Path:
    """Find the directory with Kafka's jars; fetch them if they are missing.

    Progress goes to standard error.

    Args:
        cache: place of the directory of jars. None: the user's cache.

    Raises:
        ServiceError: the jars cannot be fetched or stored, or they differ from the pinned ones.
    """
    try:
        cache = cache or _user_cache()
        jars = cache / f"kafka-{KAFKA_VERSION}-jars"
        if not _complete(jars):
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(cache / f"{jars.name}.lock"):
                if not _complete(jars):  # another run may have fetched them by now
                    _fetch_into(jars)
    except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
        raise ServiceError(
            f"the jars of Apache Kafka {KAFKA_VERSION} cannot be fetched ({error}):"
            " check the network, or give the address of a running broker"
        ) from error
    return jars


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recur"


def _coordinates() -> Iterator[tuple[str, str, str]]:
    """List group, artifact and version of each jar."""
    for group, artifacts in JARS.items():
        for artifact in artifacts.split():
            name, _, version = artifact.partition(":")
            yield group, name, version


def _complete(jars: Path) -> bool:
    return all((jars / f"{name}-{version}.jar").is_file() for _, name, version in _coordinates())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock on ``path``; the system releases it if this process is killed."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print("Waiting for another run to fetch Apache Kafka", file=sys.stderr, flush=True)
        try:
            lock.acquire(timeout=FETCH_LIMIT_SECONDS)
        except Timeout:
            raise TimeoutError(f"another run has held {path} for too long") from None
    try:
        yield
    finally:
        lock.release()


def _fetch_into(jars: Path) -> None:
    staging = jars.with_name(f"{jars.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed run
    staging.mkdir()
    try:
        files = _download(staging / "repository", list(_coordinates()))
        for file in files:
            file.replace(staging / file.name)
        shutil.rmtree(staging / "repository")
        found = _digest(sorted(staging.iterdir()))
        if found != JARS_SHA256:
            raise RuntimeError(f"their SHA-256 is {found} and must be {JARS_SHA256}")
        shutil.rmtree(jars, ignore_errors=True)  # it may be incomplete
        staging.rename(jars)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(repository: Path, coordinates: Sequence[tuple[str, str, str]]) -> list[Path]:
    # Imported here: only the first run needs it, and the import takes a third of a second.
    from jgo.config import GlobalSettings
    from jgo.maven import MavenContext, PythonResolver

    progress = _Progress(len(coordinates))
    context = MavenContext(
        resolver=PythonResolver(progress_callback=progress.file),
        repo_cache=repository,
        timeout=_REQUEST_TIMEOUT_SECONDS,
    )
    context.remote_repos.update(GlobalSettings.load().repositories)

    def fetch(coordinate: tuple[str, str, str]) -> Path:
        group, name, version = coordinate
        return Path(context.project(group, name).at_version(version).artifact().resolve())

    with ThreadPoolExecutor(_FETCHES_AT_ONCE) as pool:
        try:
            files = list(pool.map(fetch, coordinates))
        except BaseException:
            progress.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            progress.close()
    return files


def _digest(files: Sequence[Path]) -> str:
    lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class _Progress:
    """A line on standard error: redrawn on a terminal, otherwise repeated every 10 MB."""

    def __init__(self, files: int) -> None:
        self._deadline = time.monotonic() + FETCH_LIMIT_SECONDS
        self._lock = threading.Lock()
        self._redraw = sys.stderr.isatty()
        self._start, self._end = ("\r", "") if self._redraw else ("", "\n")
        self._files, self._files_done = files, 0
        self._bytes_done = self._bytes_shown = 0
        self._show()

    @contextmanager
    def file(self, name: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
        """Show the progress of one file, in the form that jgo expects."""
        yield self._add
        with self._lock:
            self._files_done += 1

    def cancel(self) -> None:
        """Make every running download end with an error."""
        self._deadline = 0.0

    def close(self) -> None:
        self._show()
        if self._redraw:
            print(file=sys.stderr)

    def _add(self, size_bytes: int) -> None:
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"only {self._files_done} of {self._files} jars arrived in time")
        with self._lock:
            self._bytes_done += size_bytes
            step = 500_000 if self._redraw else 10_000_000
            if self._bytes_done - self._bytes_shown >= step:
                self._show()

    def _show(self) -> None:
        self._bytes_shown = self._bytes_done
        print(
            f"{self._start}Fetching Apache Kafka {KAFKA_VERSION} (only once): "
            f"{self._files_done} of {self._files} jars, "
            f"{self._bytes_done / 1e6:.0f} of {JARS_MEGABYTES} MB",
            end=self._end,
            file=sys.stderr,
            flush=True,
        )
