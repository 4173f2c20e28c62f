"""The AsyncAPI document says what workers read and write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from pipeline.kafka.asyncapi import CHANNELS, DEAD_LETTER_HEADERS, TOPICS, asyncapi_document
from pipeline.messages.decoding import REASONS
from pipeline.messages.labels import decode_label
from pipeline.messages.scores import Score, decode_alert, decode_score
from pipeline.messages.transactions import decode_transaction
from pipeline.settings import Settings, load_settings
from tests.fakes.memory_workers import World
from tests.pipeline.scoring.helpers import read_on

DOCUMENT = asyncapi_document(Settings.model_construct())
MESSAGES = DOCUMENT["components"]["messages"]


def references(part: Any) -> Iterator[str]:
    """Find every reference in a part of the document."""
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        part = list(part.values())
    if isinstance(part, list):
        for inner in part:
            yield from references(inner)


def test_every_topic_is_a_channel_under_its_name() -> None:
    settings = load_settings(topic_prefix="eu-", alerts_topic="alarm")
    channels = asyncapi_document(settings)["channels"]

    assert channels.keys() == CHANNELS.keys() == set(TOPICS)
    assert {name: channel["address"] for name, channel in channels.items()} == {
        role: settings.topic(role) for role in TOPICS
    }


def test_every_reference_leads_somewhere_and_every_message_is_used() -> None:
    found = set(references(DOCUMENT))
    for reference in found:
        part = DOCUMENT
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]
        assert part

    assert {f"#/components/messages/{name}" for name in MESSAGES} <= found
    assert {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]} <= found


def test_the_examples_are_records_that_the_decoders_take() -> None:
    values = {
        name: msgspec.json.encode(message["examples"][0]["payload"])
        for name, message in MESSAGES.items()
        if "examples" in message
    }

    assert decode_transaction(b"a-17", values.pop("Transaction"), "EUR").country == "DE"
    assert decode_label(b"m-204", values.pop("Label"))[0].label == "fraud"
    alert = decode_alert(values.pop("Alert"))
    assert decode_score(values.pop("Score")).source == alert.source == "transactions:0:17"
    assert not values


@pytest.mark.parametrize("role", ["scores", "alerts"])
def test_a_worker_writes_the_documented_fields_and_headers(role: str) -> None:
    (name,) = CHANNELS[role].messages  # type: ignore[index]
    headers = MESSAGES[name]["headers"]["properties"]
    schema = DOCUMENT["components"]["schemas"][name]
    world = World(cloudevents_scores=True, review_threshold=0.0)
    world.produce("A")

    read_on(world)

    (record,) = world.kafka.records(world.settings.topic(role))  # type: ignore[arg-type]
    assert {header for header, _ in record.headers} == headers.keys()
    for header, value in record.headers:
        assert headers[header].get("const", value.decode()) == value.decode()
    fields = msgspec.json.decode(record.value or b"")
    assert set(schema["required"]) <= fields.keys() <= schema["properties"].keys()
    assert fields["decision"] in schema["properties"]["decision"]["enum"]


def test_a_worker_writes_dead_letters_with_the_documented_headers() -> None:
    headers = MESSAGES["DeadLetter"]["headers"]
    world = World(dead_letter_value_max_bytes=3)
    world.produce_raw(b"A", b"not a transaction")
    world.produce_raw(b"A", b"{}")

    read_on(world)

    cut, whole = (
        dict(record.headers) for record in world.kafka.records(world.settings.topic("dead_letter"))
    )
    assert cut.keys() == DEAD_LETTER_HEADERS.keys() == headers["properties"].keys()
    assert whole.keys() == set(headers["required"])
    assert headers["properties"]["reason"]["enum"] == list(REASONS)


def test_a_score_is_documented_without_words_for_python() -> None:
    description = DOCUMENT["components"]["schemas"]["Score"]["description"]

    assert Score.__doc__
    assert ":data:" in Score.__doc__
    assert "STATE_INVALID" in description
    assert ":data:" not in description
    assert "``" not in description
