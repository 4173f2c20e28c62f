"""Kafka's jars are fetched once, checked against their digest, and fetched again if missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import ServiceError
from pipeline.local.kafka_jars import JARS, jar_directory
from pipeline.local.ports import HOST, free_port

REPOSITORY = Path(__file__).parents[3]


@contextmanager
def maven_mirror(tampered: str = "") -> Iterator[tuple[str, list[str]]]:
    """Serve the cached jars as a Maven repository: its address, and the requested paths.

    Args:
        tampered: jar that gets an additional byte.
    """
    jars = jar_directory()
    requested: list[str] = []

    class Mirror(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requested.append(self.path)
            jar = jars / Path(self.path).name
            known = jar.is_file()
            body = jar.read_bytes() if known else b""
            if jar.name == tampered:
                body += b"\0"
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Mirror) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}", requested
        finally:
            server.shutdown()
            thread.join()


def fetch_environment(tmp_path: Path, mirror: str) -> dict[str, str]:
    """Environment of a run with an empty cache that fetches from ``mirror``."""
    settings = tmp_path / "jgo.conf"
    settings.write_text(f"[repositories]\ncentral = {mirror}\n")
    cache = tmp_path / "cache"
    return {"JGO_CONFIG_FILE": str(settings), "XDG_CACHE_HOME": str(cache), "NO_PROXY": "*"}


def test_two_runs_fetch_the_jars_once_and_show_their_progress(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "from pipeline.local import kafka_jars as k; k.jar_directory()",
    ]
    with maven_mirror() as (mirror, requested):
        environment = os.environ | fetch_environment(tmp_path, mirror)
        runs = [
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        outputs = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    number = sum(len(artifacts.split()) for artifacts in JARS.values())
    assert len([path for path in requested if path.endswith(".jar")]) == number
    assert f"{number} of {number} jars" in outputs[0] + outputs[1]
    assert sorted(path.name for path in (tmp_path / "cache" / "recur").iterdir()) == [
        jar_directory().name,
        f"{jar_directory().name}.lock",
    ]


def test_jars_that_differ_from_the_pinned_ones_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with maven_mirror(tampered="jspecify-1.0.0.jar") as (mirror, _):
        for name, value in fetch_environment(tmp_path, mirror).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ServiceError, match="their SHA-256 is"):
            jar_directory(tmp_path / "fetched")
    assert not list((tmp_path / "fetched").glob("*jars"))


def test_an_unreachable_repository_gives_an_error_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreachable = f"http://{HOST}:{free_port()}"
    for name, value in fetch_environment(tmp_path, unreachable).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ServiceError, match=r"cannot be fetched .* check the network"):
        jar_directory(tmp_path / "fetched")


def test_an_incomplete_cache_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = jar_directory()
    incomplete = tmp_path / "fetched" / cached.name
    shutil.copytree(cached, incomplete, ignore=shutil.ignore_patterns("kafka-clients*"))
    with maven_mirror() as (mirror, _):
        for name, value in fetch_environment(tmp_path, mirror).items():
            monkeypatch.setenv(name, value)
        assert jar_directory(tmp_path / "fetched") == incomplete
    assert {jar.name for jar in incomplete.iterdir()} == {jar.name for jar in cached.iterdir()}
