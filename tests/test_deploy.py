"""The deployment files agree with the program: settings, commands, ports and metric names.

These tests read them as text. `make check-deploy` runs the parsers of Docker, Prometheus and
hadolint on them.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Metric

from pipeline.cli.main import recur
from pipeline.gateway.gateway_metrics import GatewayMetrics
from pipeline.local.kafka import Kafka
from pipeline.local.kafka_jars import KAFKA_VERSION
from pipeline.local.redis import Redis
from pipeline.local.workers import start_worker, until_ready
from pipeline.scoring.metrics import Metrics
from pipeline.settings import CONFIG_VARIABLE, Settings, load_settings
from pipeline.webhooks.endpoints import load_endpoints
from pipeline.webhooks.metrics import WebhookMetrics
from pipeline.webhooks.signing import new_secret

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
GATEWAY: dict[str, Any] = SERVICES["gateway"]
WEBHOOKS: dict[str, Any] = SERVICES["webhooks"]
OURS = {
    name: service
    for name, service in SERVICES.items()
    if service["image"] == "recur" and service not in (GATEWAY, WEBHOOKS)
}
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
JOBS: dict[str, dict[str, Any]] = {
    job["job_name"]: job
    for file in ("prometheus.yml", "gateway-scrape.yml")
    for job in yaml.safe_load((ROOT / "deploy/prometheus" / file).read_text())["scrape_configs"]
}
DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/dashboards/recur.json").read_text())
KUBERNETES_GRACE_SECONDS = 30
EVERY_SERVICE = pytest.mark.parametrize("service", OURS.values(), ids=list(OURS))


def recur_variables(text: str) -> set[str]:
    return set(re.findall(r"\bRECUR_[A-Z0-9_]+", text))


def instructions(word: str) -> list[str]:
    """Arguments of each instruction of the Dockerfile that begins with a word, lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    return re.findall(rf"^{word} (.+)$", joined, re.MULTILINE)


# Settings and commands


def test_every_variable_in_the_deployment_files_is_a_setting() -> None:
    known = {f"RECUR_{name.upper()}" for name in Settings.model_fields} | {CONFIG_VARIABLE}
    files = [
        ROOT / "docker-compose.yml",
        *(ROOT / "deploy").rglob("*.*"),
        ROOT / "deploy/Dockerfile",
    ]

    named = {v for file in files if file.is_file() for v in recur_variables(file.read_text())}

    assert named
    assert named <= known


@EVERY_SERVICE
def test_a_worker_starts_with_the_settings_that_compose_gives_it(
    service: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in service["environment"].items():
        assert isinstance(value, str), f"{name}: YAML reads {value!r} as no text; quote it"
        monkeypatch.setenv(name, value)

    settings = load_settings()

    assert settings.kafka_bootstrap_servers == "kafka:9092"
    assert settings.redis_url == "redis://redis:6379/0"


@EVERY_SERVICE
def test_compose_commands_and_variables_run_as_processes(
    service: dict[str, Any], kafka: Kafka, tmp_path: Path
) -> None:
    """Redis and worker run as in compose, except for addresses, and the worker gets ready."""
    redis_command = list(SERVICES["redis"]["command"])
    options = dict(zip(redis_command[1::2], redis_command[2::2], strict=True))
    redis_options = {name.removeprefix("--"): value for name, value in options.items()}
    with Redis(directory=tmp_path, options=redis_options) as redis_server:
        environment = dict(service["environment"]) | {
            "RECUR_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
            "RECUR_REDIS_URL": redis_server.url,
            "RECUR_TOPIC_PREFIX": "compose-",
            "RECUR_KAFKA_GROUP_ID": "compose",
        }
        assert service["command"] == ["worker"], "start_worker runs `recur worker`"
        worker = start_worker(1, tmp_path, environment)
        try:
            asyncio.run(until_ready([worker], timeout_seconds=240))
            check = subprocess.run(
                [sys.executable, ROOT / "deploy/healthcheck.py", "ready"],
                env={"RECUR_HTTP_PORT": str(worker.port)},
                capture_output=True,
                text=True,
                timeout=30,
            )
        finally:
            stopped = asyncio.run(worker.stop())

    assert check.returncode == 0, check.stderr
    assert stopped == 0


def test_the_gateway_listens_where_compose_publishes_and_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = OURS["worker"]["environment"]
    for name, value in GATEWAY["environment"].items():
        monkeypatch.setenv(name, value)
        if name in worker and name != "RECUR_HTTP_PORT":
            assert worker[name] == value

    settings = load_settings()

    assert GATEWAY["command"] == ["gateway"]
    assert settings.gateway_host == "0.0.0.0"
    assert GATEWAY["ports"] == [f"127.0.0.1:8080:{settings.gateway_port}"]
    assert settings.http_port == settings.gateway_port  # healthcheck.py asks there


def test_webhooks_read_the_endpoints_that_compose_mounts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = OURS["worker"]["environment"]
    for name, value in WEBHOOKS["environment"].items():
        monkeypatch.setenv(name, value)
        if name in worker:
            assert worker[name] == value
    source, folder, _ = WEBHOOKS["volumes"][0].split(":")

    file = load_settings().webhooks_file

    assert WEBHOOKS["command"] == ["webhooks"]
    assert file is not None
    assert file.parent == Path(folder)
    assert load_endpoints(ROOT / source / file.name) == {}
    text = (ROOT / source / file.name).read_text()
    (tmp_path / file.name).write_text(re.sub(r"(?m)^# (?=\[\[|\w+ = )", "", text))
    (tmp_path / "cases.secret").write_text(new_secret())
    assert set(load_endpoints(tmp_path / file.name)) == {"cases"}


@EVERY_SERVICE
def test_a_worker_ends_by_itself_before_it_would_be_killed(service: dict[str, Any]) -> None:
    """Docker waits for stop_grace_period, Kubernetes for 30 s where nothing else is said."""
    grace = re.fullmatch(r"(\d+)s", service["stop_grace_period"])
    assert grace is not None
    bound = float(
        service["environment"].get(
            "RECUR_SHUTDOWN_SECONDS", Settings.model_fields["shutdown_seconds"].default
        )
    )

    assert bound <= int(grace[1]) / 2
    assert bound <= KUBERNETES_GRACE_SECONDS / 2


@EVERY_SERVICE
def test_every_service_of_ours_runs_a_command_that_exists(service: dict[str, Any]) -> None:
    assert service["command"][0] in recur.commands


def test_the_image_runs_a_command_that_exists() -> None:
    assert instructions("ENTRYPOINT") == ['["recur"]']
    (command,) = (json.loads(text) for text in instructions("CMD"))
    assert command[0] in recur.commands


def test_compose_starts_two_workers_after_kafka_and_redis_are_healthy() -> None:
    worker = SERVICES["worker"]
    assert worker["deploy"]["replicas"] == 2
    for name in ("kafka", "redis"):
        assert worker["depends_on"][name] == {"condition": "service_healthy"}
        assert SERVICES[name]["healthcheck"]["test"]


def test_states_and_records_outlive_their_containers() -> None:
    for service, folder in (("kafka", "/var/lib/kafka/data"), ("redis", "/data")):
        volume = SERVICES[service]["volumes"][0]
        assert volume.partition(":")[0] in COMPOSE["volumes"]
        assert volume.partition(":")[2] == folder
    assert SERVICES["kafka"]["environment"]["KAFKA_LOG_DIRS"] == "/var/lib/kafka/data"


def test_redis_keeps_an_append_only_file_and_evicts_nothing() -> None:
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"


def test_compose_runs_the_kafka_that_the_tests_run_on() -> None:
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"


def test_foreign_images_are_pinned_and_ports_bind_to_this_machine_only() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] == "unless-stopped"
        image = service["image"]
        assert image == "recur" or re.search(r":v?\d+\.\d+", image), image
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name}: {port}"


def test_every_file_that_compose_mounts_or_builds_from_exists() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).is_dir(), volume
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()


# The image


def test_the_image_takes_torch_from_an_index_that_only_its_builder_names() -> None:
    assert "TORCH_INDEX" in instructions("ARG")  # no default
    assert SERVICES["worker"]["build"]["args"] == ["TORCH_INDEX"]
    for file in (ROOT / "deploy/Dockerfile", ROOT / "Makefile", *(ROOT / "requirements").iterdir()):
        assert not re.search(r"https?://|--extra-index|--find-links [^\"]", file.read_text()), file


def test_the_image_is_built_from_requirements_with_hashes() -> None:
    for file in (ROOT / "requirements").glob("*.txt"):
        header, *pins = file.read_text().replace("\\\n", " ").splitlines()
        assert header.startswith("#")
        assert pins
        for pin in pins:
            assert re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", pin), pin
    installs = [
        command
        for step in instructions("RUN")
        for command in step.split("&&")
        if "--requirement" in command
    ]
    assert len(installs) == 2
    for command in installs:
        assert "--require-hashes" in command


def test_the_image_does_not_run_as_root() -> None:
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    (user,) = re.findall(r"^USER (\d+):(\d+)$", last_stage, re.MULTILINE)
    assert user == ("10001", "10001")
    assert last_stage.index("USER ") < last_stage.index("ENTRYPOINT")


def test_the_image_gets_every_file_that_it_copies() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for step in instructions("COPY"):
        if not step.startswith("--from"):
            for source in step.split()[:-1]:
                pattern = "requirements/*.txt" if source == "requirements/" else source
                assert f"!{pattern}" in ignored, source
                assert (ROOT / source).exists(), source


@pytest.fixture
def worker_port() -> Iterator[int]:
    """A worker that is alive and not ready."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"redis: away" if self.path == "/ready" else b"alive"
            self.send_response(503 if self.path == "/ready" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the tests' output clean."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def ask(question: str, port: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "deploy/healthcheck.py", question],
        env={"RECUR_HTTP_PORT": str(port)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_health_check_tells_alive_from_ready_and_names_the_problem(worker_port: int) -> None:
    assert ask("live", worker_port).returncode == 0
    not_ready = ask("ready", worker_port)
    assert not_ready.returncode == 1
    assert not_ready.stderr == "/ready: 503 redis: away\n"


def test_the_health_check_fails_where_nothing_answers() -> None:
    nobody = ask("live", 1)
    assert nobody.returncode == 1
    assert nobody.stderr.startswith("/live on port 1: ")


def test_the_health_check_ignores_a_kubernetes_service_named_like_its_port() -> None:
    script = [sys.executable, str(ROOT / "deploy/healthcheck.py"), "live"]
    environment = {"RECUR_HTTP_PORT": "tcp://10.96.0.13:9100"}
    asked = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert asked.returncode == 0 or asked.stderr.startswith("/live")


# Prometheus and Grafana


def test_prometheus_scrapes_every_worker_where_it_listens() -> None:
    job = JOBS["recur"]
    (discovery,) = job["dns_sd_configs"]
    assert set(discovery["names"]) == set(OURS)
    port = SERVICES["worker"]["environment"]["RECUR_HTTP_PORT"]
    assert discovery["port"] == int(port)
    assert SERVICES["worker"]["expose"] == [port]
    assert instructions("EXPOSE") == [port]
    assert "RECUR_HTTP_HOST=0.0.0.0" in DOCKERFILE


def test_prometheus_scrapes_gateways_and_webhooks_where_they_listen() -> None:
    (gateways,) = JOBS["recur-gateway"]["dns_sd_configs"]
    assert gateways["names"] == ["gateway"]
    assert gateways["port"] == int(GATEWAY["environment"]["RECUR_HTTP_PORT"])
    assert "/gateway-key" in (ROOT / ".gitignore").read_text()
    (webhooks,) = JOBS["recur-webhooks"]["dns_sd_configs"]
    assert webhooks["port"] == Settings.model_fields["http_port"].default


def test_every_job_that_alerts_select_is_scraped() -> None:
    selected = re.findall(r'job="([^"]+)"', " ".join(expressions().values()))
    assert set(selected) == set(JOBS)


def all_metrics() -> list[Any]:
    """Metrics of a worker, a gateway and `recur webhooks`, with an endpoint's."""
    webhooks = WebhookMetrics(CollectorRegistry())
    webhooks.begin("cases")
    return [Metrics(CollectorRegistry()), GatewayMetrics(), webhooks]


def families() -> list[Metric]:
    return [family for metrics in all_metrics() for family in metrics.registry.collect()]


def sample_names() -> set[str]:
    """Names under which Prometheus stores our metrics."""
    endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}
    return {
        family.name + ending for family in families() for ending in endings.get(family.type, [""])
    }


def alert_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Queries of alerts and dashboard, by their place."""
    rules = alert_rules()
    found = {rule.get("alert") or rule["record"]: rule["expr"] for rule in rules}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} ({target['refId']})"] = target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        found[f"variable {variable['name']}"] = variable.get("definition", "")
    return found


def test_every_metric_in_alerts_and_dashboard_exists() -> None:
    known = sample_names()
    unknown = {
        where: missing
        for where, expression in expressions().items()
        if (missing := set(re.findall(r"\brecur_\w+", expression)) - known)
    }
    assert not unknown


def test_the_runbook_has_a_line_for_each_alert_and_the_rules_tests_fire_each() -> None:
    runbook = (ROOT / "docs/operations.md").read_text()
    fired = (ROOT / "deploy/prometheus/alerts.test.yml").read_text()
    names = [rule["alert"] for rule in alert_rules() if "alert" in rule]
    assert not [name for name in names if f"| `{name}` |" not in runbook]
    assert not [name for name in names if name not in fired]


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = set(re.findall(r"\brecur_\w+", json.dumps(DASHBOARD["panels"])))
    hidden = {
        family.name
        for family in families()
        if family.name.startswith("recur_")
        and not any(name.startswith(family.name) for name in shown)
    }
    assert not hidden


def test_every_label_in_alerts_and_dashboard_exists() -> None:
    known = {
        name
        for metrics in all_metrics()
        for metric in vars(metrics).values()
        for name in getattr(metric, "_labelnames", ())
    }
    known |= {"le", "job", "instance", "alertname", "alertstate", "digest"}
    for where, expression in expressions().items():
        matchers = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
        grouped = [
            label
            for group in re.findall(r"\bby \(([^)]*)\)", expression)
            for label in group.split(", ")
        ]
        assert {*matchers, *grouped} <= known, where


def test_the_dashboard_has_what_grafana_requires() -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((provisioning / "dashboards/recur.yml").read_text())["providers"]
    folder = provider["options"]["path"]
    grafana = SERVICES["grafana"]
    panels = DASHBOARD["panels"]
    variables = {f"${{{variable['name']}}}" for variable in DASHBOARD["templating"]["list"]}

    assert source["url"] == "http://prometheus:9090"
    assert f"./deploy/grafana/dashboards:{folder}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/recur.json"
    assert DASHBOARD["uid"]
    assert DASHBOARD["schemaVersion"] >= 39
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert panel["targets"], panel["title"]
            assert panel["datasource"]["uid"] in variables


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            assert x < 24
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
