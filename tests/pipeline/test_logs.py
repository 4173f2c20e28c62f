"""Log lines: one JSON object each, with their fields, and quiet where libraries tell too much."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from pipeline import logs
from pipeline.errors import RecurError

SECRET = "4111-1111-1111-1111"


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in logs.QUIET_LOGGERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_a_line_is_one_json_object_with_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")

    logging.getLogger("pipeline.scoring.partitions").warning(
        "partitions %s",
        "assigned",
        extra={"topic_partitions": [1, 2], "why": 'a "reason"\nand more'},
    )

    (line,) = lines(capsys)
    time = line.pop("time")
    assert len(time) == len("2026-01-01T00:00:00.000Z")
    assert time.endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "pipeline.scoring.partitions",
        "message": "partitions assigned",
        "topic_partitions": [1, 2],
        "why": 'a "reason"\nand more',
    }


def test_what_is_no_json_is_written_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")

    logging.getLogger("x").info("m", extra={"bytes_": b"\xff", "set_": {1}, "error": OSError(2)})

    (line,) = lines(capsys)
    assert line["bytes_"] == "b'\\xff'"


def test_an_exception_stays_in_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    try:
        raise ZeroDivisionError("by nothing")
    except ZeroDivisionError:
        logging.getLogger("x").exception("it failed")

    (line,) = lines(capsys)
    assert "ZeroDivisionError: by nothing" in line["exception"]


@pytest.mark.parametrize(
    ("level", "expected"),
    [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)],
)
def test_the_level_is_the_least_severe_that_is_written(
    capsys: pytest.CaptureFixture[str], level: str, expected: int
) -> None:
    logs.configure(level, "json")
    log = logging.getLogger("x")
    for severity in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        log.log(severity, "m")

    assert len(lines(capsys)) == expected


@pytest.mark.parametrize("name", ["aiokafka.producer.producer", "faust.app", "redis.client"])
def test_libraries_that_write_payloads_at_debug_are_quiet_even_then(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    logs.configure("debug", "json")
    log = logging.getLogger(name)

    log.debug("Sending (key=%s value=%s)", SECRET, SECRET)
    log.info("fetched %s", SECRET)
    log.warning("the broker is away")

    assert [line["message"] for line in lines(capsys)] == ["the broker is away"]


def test_what_libraries_repeat_is_counted_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    library = logging.getLogger("aiokafka")

    for attempt in range(500):
        library.warning("Unable connect to node with id %s: %s", attempt % 3, ConnectionError())
        library.error("Unable connect to node with id %s: %s", attempt % 3, OSError(111, "no"))
        library.warning(f"took {attempt} ms at 0x7f{attempt:08x}")
    assert lines(capsys) == []
    logs.summarize_dropped()
    logs.summarize_dropped()

    (line,) = lines(capsys)
    assert (line["lines"], line["kinds"], line["times"]) == (1_500, 3, 500)
    assert line["most_often"].startswith("aiokafka: ")


def test_an_error_of_a_library_that_is_new_is_told_at_once_and_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "json")

    for number in range(5):
        logging.getLogger("faust.app").error("a defect in task %s", number)
        logging.getLogger("aiokafka.conn").error("a defect in task %s", number)

    assert [line["logger"] for line in lines(capsys)] == ["faust.app", "aiokafka.conn"]
    logs.summarize_dropped()
    assert lines(capsys)[0]["lines"] == 8


def test_an_error_of_our_own_is_left_to_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logging.getLogger("faust.app.base").error("[^-App]: Crashed reason=%r", RecurError("x"))
    logging.getLogger("faust.worker").critical("[^_Process]: We experienced a crash! Reraising")
    logs.summarize_dropped()

    assert lines(capsys) == []


def test_lines_of_another_kind_each_are_bounded_in_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "json")
    library = logging.getLogger("mode.worker")

    for number in range(5 * logs.KINDS_MAX):
        name = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        library.error(f"defect {name}")

    assert len(lines(capsys)) <= logs.KINDS_MAX + 1
    logs.summarize_dropped()
    assert lines(capsys)[0]["kinds"] == 1


def test_what_is_told_with_a_services_outage_is_not_told_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "json")
    for _ in range(7):
        logging.getLogger("aiokafka").warning("away")
        logging.getLogger("redis.client").warning("away")

    assert logs.take_dropped("kafka") == 7
    assert logs.take_dropped("kafka") == 0
    logs.summarize_dropped()

    assert lines(capsys)[0]["lines"] == 7


def test_text_is_readable_and_holds_the_same_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")

    logging.getLogger("pipeline.scoring.retry").warning(
        "it does not answer", extra={"service": "redis"}
    )

    text = capsys.readouterr().err
    assert text.endswith("warning  pipeline.scoring.retry  it does not answer  service=redis\n")


@pytest.mark.parametrize("form", ["json", "text"])
def test_configuring_twice_does_not_double_the_lines(
    capsys: pytest.CaptureFixture[str], form: Literal["json", "text"]
) -> None:
    logs.configure("info", form)
    logs.configure("info", form)
    logging.getLogger("x").info("once")

    assert len(capsys.readouterr().err.splitlines()) == 1
