"""Names of aiokafka, Faust and mode that are not public and that the product overrides or reads.

An upgrade that renames one or changes its parameters fails here within a second.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition, conn
from aiokafka import codec as aiokafka_codec
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.client import AIOKafkaClient
from aiokafka.cluster import ClusterMetadata
from aiokafka.consumer import fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.consumer.subscription_state import (
    Assignment,
    Subscription,
    SubscriptionState,
    TopicPartitionState,
)
from aiokafka.producer import sender
from aiokafka.producer.message_accumulator import MessageAccumulator
from aiokafka.producer.sender import Sender
from aiokafka.producer.transaction_manager import TransactionManager
from aiokafka.protocol import produce
from aiokafka.protocol.api import Request
from aiokafka.record.memory_records import MemoryRecords
from faust.transport import drivers
from faust.transport.drivers import aiokafka as driver
from mode.threads import ServiceThread

ROOT = Path(__file__).resolve().parents[3]


def own_class(kind: type, module: Any) -> Any:
    """Return aiokafka's own class, even where the product has replaced it in this process."""
    return next(base for base in kind.__mro__ if base.__module__ == module.__name__)


PARTITION_RECORDS = own_class(fetcher.PartitionRecords, fetcher)
CONNECTION = own_class(conn.AIOKafkaConnection, conn)

METHODS = [
    # pipeline/kafka: called
    (AIOKafkaAdminClient, "_send_request", "self, request, node_id=None"),
    (AIOKafkaClient, "get_random_node", "self"),
    (AIOKafkaClient, "send", "self, node_id, request, *, group=<ConnectionGroup.DEFAULT: 0>"),
    (TransactionManager, "wait_for_transaction_end", "self"),
    (TransactionManager, "is_in_transaction", "self"),
    (MessageAccumulator, "_append_batch", "self, builder, tp"),
    # pipeline/kafka: overridden or replaced
    (Request, "build", "self, request_struct_class"),
    (MemoryRecords, "size_in_bytes", "self"),
    (MemoryRecords, "has_next", "self"),
    (MemoryRecords, "next_batch", "self"),
    (
        PARTITION_RECORDS,
        "__init__",
        "self, tp, records, aborted_transactions, fetch_offset, key_deserializer,"
        " value_deserializer, check_crcs, isolation_level",
    ),
    # pipeline/kafka/steady_fetcher.py: called
    (
        AIOKafkaClient,
        "_get_conn",
        "self, node_id, *, group=<ConnectionGroup.DEFAULT: 0>, no_hint=False",
    ),
    (ClusterMetadata, "leader_for_partition", "self, partition"),
    (SubscriptionState, "is_assigned", "self, tp"),
    (SubscriptionState, "wait_for_assignment", "self"),
    (fetcher.Fetcher, "_create_fetch_waiter", "self"),
    (fetcher.Fetcher, "_notify", "self, future"),
    (fetcher.FetchResult, "__init__", "self, tp, *, assignment, partition_records, backoff"),
    (fetcher.FetchResult, "has_more", "self"),
    (fetcher.FetchError, "check_raise", "self"),
    (TopicPartitionState, "consumed_to", "self, position"),
    # pipeline/kafka/steady_fetcher.py: overridden
    (fetcher.FetchResult, "getall", "self, max_records=None"),
    (fetcher.Fetcher, "_proc_fetch_request", "self, assignment, node_id, request"),
    (fetcher.Fetcher, "fetched_records", "self, partitions, timeout=0, max_records=None"),
    (fetcher.Fetcher, "seek_to", "self, tp, offset"),
    (fetcher.Fetcher, "request_offset_reset", "self, tps, strategy"),
    (PARTITION_RECORDS, "_consumer_record", "self, tp, record"),
    # pipeline/kafka/connection.py: called
    (CONNECTION, "_next_correlation_id", "self"),
    (CONNECTION, "_on_read_task_error", "self_ref, read_task"),
    # pipeline/kafka/connection.py: overridden
    (CONNECTION, "_create_reader_task", "self"),
    (CONNECTION, "_handle_frame", "self, resp"),
    (CONNECTION, "send", "self, request, expect_response=True"),
    # pipeline/kafka/produce_request.py: overridden
    (produce.ProduceRequest, "__init__", "self, transactional_id, required_acks, timeout, topics"),
    # pipeline/worker/faust_transport.py: called
    (AIOKafkaClient, "force_metadata_update", "self"),
    (GroupCoordinator, "check_errors", "self"),
    (GroupCoordinator, "request_rejoin", "self"),
    (Assignment, "state_value", "self, tp"),
    (ServiceThread, "_serve", "self"),
    (driver.AIOKafkaConsumerThread, "_ensure_consumer", "self"),
    (
        driver.AIOKafkaConsumerThread,
        "_fetch_records",
        "self, consumer, active_partitions, timeout=None, max_records=None",
    ),
    (driver.AIOKafkaConsumerThread, "earliest_offsets", "self, *partitions"),
    (driver.AIOKafkaConsumerThread, "seek", "self, partition, offset"),
    (driver.Consumer, "commit_and_end_transactions", "self"),
    # pipeline/worker/faust_transport.py: overridden
    (driver.AIOKafkaConsumerThread, "_create_worker_consumer", "self, transport"),
    (driver.AIOKafkaConsumerThread, "_gather_remaining_tasks", "self"),
    (driver.Consumer, "_new_consumer_thread", "self"),
    (driver.Consumer, "_drain_messages", "self, fetcher"),
    (driver.Consumer, "resume_flow", "self"),
    (driver.Consumer, "_filter_tps_with_pending_acks", "self, topics=None"),
    (driver.Consumer, "_new_offset", "self, tp"),
    (driver.Consumer, "ack", "self, message"),
    (driver.Consumer, "wait_empty", "self"),
    (driver.Consumer, "on_partitions_revoked", "self, revoked"),
    (driver.Consumer, "on_partitions_assigned", "self, assigned, generation_id=0"),
    (driver.Consumer, "perform_seek", "self"),
    (driver.Consumer, "verify_event_path", "self, now, tp"),
]
"""Class, method and parameters as the installed versions have them."""

PROPERTIES = [
    (Sender, "sender_task"),
    (SubscriptionState, "subscription"),
    (Subscription, "assignment"),
    (TopicPartitionState, "position"),
    (TopicPartitionState, "has_valid_position"),
    (TopicPartitionState, "paused"),
    (Assignment, "active"),
]

FETCHER = {
    "_check_crcs", "_closed", "_fetch_max_bytes", "_fetch_max_wait_ms", "_fetch_min_bytes",
    "_fetch_waiters", "_fetcher_timeout", "_isolation_level", "_loop",
    "_max_partition_fetch_bytes", "_prefetch_backoff", "_records", "_retry_backoff",
    "_subscriptions", "_wait_consume_future",
}  # fmt: skip

CONNECTIONS = {
    "_client_id", "_closed_fut", "_host", "_last_action", "_loop", "_port", "_reader",
    "_request_timeout", "_requests", "_versions", "_writer",
}  # fmt: skip

ATTRIBUTES = {
    "_client": "AIOKafkaConsumer, AIOKafkaAdminClient",
    "_fetcher": "AIOKafkaConsumer",
    "_coordinator": "AIOKafkaConsumer",
    "_subscription": "AIOKafkaConsumer",
    "_isolation_level": "AIOKafkaConsumer",
    "_max_poll_records": "AIOKafkaConsumer",
    "_prefetch_backoff": "Fetcher",
    "_sender": "AIOKafkaProducer",
    "_txn_manager": "AIOKafkaProducer",
    "_message_accumulator": "AIOKafkaProducer",
    **dict.fromkeys(("_batches", "_closed", "_exception"), "MessageAccumulator"),
    **dict.fromkeys(("_builder", "_relative_offset"), "BatchBuilder"),
    **dict.fromkeys(("_assignment", "_partition_records"), "FetchResult"),
    "_records_iterator": "PartitionRecords",
    "_drain_waiter": "MessageBatch",
    "_consumer": "AIOKafkaConsumerThread",
    "_thread": "Consumer of Faust",
    "_committed_offset": "Consumer of Faust",
    "_active_partitions": "Consumer of Faust",
    **dict.fromkeys(FETCHER, "Fetcher"),
    **dict.fromkeys(CONNECTIONS, "AIOKafkaConnection"),
    **dict.fromkeys(("_transactional_id", "_timeout", "_topics"), "ProduceRequest"),
    "_auto_offset_reset": "AIOKafkaConsumer",
}
"""Private attributes, and the classes whose constructors set them; a test below looks at each."""


def parameters(function: Any) -> str:
    """Render a function's parameters without their types."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


@pytest.mark.parametrize(
    ("owner", "name", "expected"), METHODS, ids=[f"{o.__name__}.{n}" for o, n, _ in METHODS]
)
def test_a_method_has_the_parameters_that_we_rely_on(owner: Any, name: str, expected: str) -> None:
    assert parameters(getattr(owner, name)) == expected


@pytest.mark.parametrize(
    ("owner", "name"), PROPERTIES, ids=[f"{o.__name__}.{n}" for o, n in PROPERTIES]
)
def test_a_property_that_we_read_is_there(owner: Any, name: str) -> None:
    assert isinstance(inspect.getattr_static(owner, name), property)


def test_a_consumer_has_the_attributes_that_we_read() -> None:
    async def look() -> None:
        consumer = AIOKafkaConsumer(bootstrap_servers="127.0.0.1:1", group_id="group")
        try:
            assert vars(consumer).keys() >= {
                "_client", "_fetcher", "_coordinator", "_subscription", "_isolation_level",
                "_max_poll_records", "_auto_offset_reset",
            }  # fmt: skip
            assert isinstance(consumer._client, AIOKafkaClient)
            assert isinstance(consumer._subscription, SubscriptionState)
            fetch = fetcher.Fetcher(consumer._client, consumer._subscription, prefetch_backoff=7.0)
            assert fetch._prefetch_backoff == 7.0
            assert vars(fetch).keys() >= FETCHER
            await fetch.close()
        finally:
            await consumer.stop()

    asyncio.run(look())


def test_a_connection_and_its_requests_have_the_attributes_that_we_read() -> None:
    async def look() -> None:
        assert vars(CONNECTION("127.0.0.1", 1)).keys() >= CONNECTIONS

    asyncio.run(look())
    request = produce.ProduceRequest("id", -1, 7, [])
    assert vars(request).keys() >= {"_transactional_id", "_timeout", "_topics"}
    assert request.required_acks == -1


def test_aiokafka_makes_connections_and_requests_through_the_names_that_we_replace() -> None:
    assert "AIOKafkaConnection(" in inspect.getsource(conn.create_conn)
    assert "ProduceRequest(" in inspect.getsource(sender.SendProduceReqHandler.create_request)


def test_an_admin_client_has_the_attribute_that_we_read() -> None:
    async def look() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers="127.0.0.1:1")
        try:
            assert isinstance(admin._client, AIOKafkaClient)
        finally:
            await admin.close()

    asyncio.run(look())


def test_a_producer_has_the_attributes_that_we_read() -> None:
    async def look() -> None:
        producer = AIOKafkaProducer(bootstrap_servers="127.0.0.1:1", transactional_id="id")
        try:
            assert isinstance(producer._sender, Sender)
            assert isinstance(producer._txn_manager, TransactionManager)
            assert isinstance(producer._message_accumulator, MessageAccumulator)
        finally:
            producer._closed = True  # it never started, and stop() would wait for its sender
            await producer.client.close()

    asyncio.run(look())


def test_a_producer_keeps_batches_with_the_future_that_we_read() -> None:
    async def look() -> None:
        batches = MessageAccumulator(ClusterMetadata(), 1024, 0, 1)
        builder = batches.create_builder()
        builder.append(timestamp=None, key=None, value=b"x", headers=[])
        builder.close()
        assert vars(builder).keys() >= {"_builder", "_relative_offset"}
        delivery = await batches.add_batch(builder, TopicPartition("topic", 0), timeout=1)
        assert vars(batches).keys() >= {"_batches", "_closed", "_exception"}
        ((batch,),) = batches._batches.values()
        assert isinstance(batch._drain_waiter, asyncio.Future)
        assert isinstance(batch.future, asyncio.Future)
        delivery.cancel()

    asyncio.run(look())


def test_fetched_records_have_the_attributes_that_we_read() -> None:
    records = PARTITION_RECORDS(None, None, [], 0, None, None, True, 0)
    assert vars(records).keys() >= {"_records_iterator", "next_fetch_offset"}
    result = fetcher.FetchResult(None, assignment=None, partition_records=records, backoff=0)
    assert vars(result).keys() >= {"_assignment", "_partition_records"}


def test_fausts_classes_have_the_attributes_that_we_read() -> None:
    assert "_consumer" in driver.AIOKafkaConsumerThread.__annotations__
    assert driver.AIOKafkaConsumerThread.Worker is not None
    assert drivers.TRANSPORTS.aliases["aiokafka"]
    source = inspect.getsource(driver.ThreadDelegateConsumer.__init__)
    assert "self._thread = " in source
    base = inspect.getsource(inspect.getmodule(driver.ConsumerThread) or driver)
    assert "self._committed_offset = " in base
    assert "self._active_partitions = " in base


def test_aiokafka_decompresses_and_fetches_through_the_names_that_we_replace() -> None:
    for name in ("MemoryRecords", "PartitionRecords"):
        assert f"{name}(" in inspect.getsource(fetcher.Fetcher)
    for codec in ("lz4", "zstd"):
        assert callable(getattr(aiokafka_codec.cramjam, codec).decompress_into)
    assert issubclass(aiokafka_codec.cramjam.DecompressionError, Exception)


# completeness ----------------------------------------------------------------------------


def modules_with_private_names() -> list[Path]:
    """Modules of the product in which ruff allows private names of libraries."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ignores = config["tool"]["ruff"]["lint"]["per-file-ignores"]
    rooms = ("pipeline/kafka/", "pipeline/worker/")
    return [ROOT / file for file, rules in ignores.items() if "SLF" in rules and
            file.startswith(rooms)]  # fmt: skip


def own_names(source: str) -> set[str]:
    """Functions and classes that a module defines, and attributes of self that it sets."""
    tree = ast.parse(source)
    defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(tree) if isinstance(node, defined)} | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_of_self(node)
    }


def is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def private_names(source: str, own: set[str]) -> set[str]:
    """Names with an underscore that a module reads of other objects, or of a library's base."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)
        if not (is_of_self(node) and node.attr in own)
    }


def test_every_private_name_that_the_product_reads_is_listed_here() -> None:
    listed = {name for _, name, _ in METHODS} | ATTRIBUTES.keys()
    of_our_base = own_names((ROOT / "pipeline/kafka/producer.py").read_text())
    modules = modules_with_private_names()
    assert [file.name for file in modules] == [
        "acl.py", "producer.py", "score_log.py", "steady_fetcher.py", "topics.py",
        "transactional_producer.py", "faust_transport.py",
    ]  # fmt: skip
    of_base_classes = [
        ROOT / f"pipeline/kafka/{name}.py" for name in ("connection", "produce_request")
    ]
    for file in [*modules, *of_base_classes]:
        source = file.read_text()
        found = private_names(source, own_names(source) | of_our_base)
        assert found - {"_replace"} <= listed, file.name  # _replace: of a named tuple


def test_a_private_name_that_is_not_listed_is_found() -> None:
    source = "class A(B):\n def f(self, x):\n  self._own = x._theirs.y\n  self._base()"

    assert private_names(source, own_names(source)) == {"_theirs", "_base"}
