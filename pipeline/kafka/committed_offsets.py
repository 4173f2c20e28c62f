"""The offsets that the workers' group has committed, each with the log that it is of."""

from __future__ import annotations

from aiokafka import errors as kafka_errors
from aiokafka.admin import AIOKafkaAdminClient

from pipeline.errors import RecurError
from pipeline.settings import Settings
from pipeline.topic_id import committed_offset


async def committed_offsets(settings: Settings) -> dict[int, int]:
    """Read how far the workers' group has come, by partition of the transactions topic.

    Each offset tells its log (:func:`pipeline.topic_id.log_of`). A partition without commits is not
    in it; none is while the broker finds the group's state.

    Raises:
        RecurError: the broker is away.
    """
    admin = AIOKafkaAdminClient(**settings.kafka_client_options())
    topic = settings.topic("transactions")
    try:
        await admin.start()
        found = await admin.list_consumer_group_offsets(settings.kafka_group_id)
    except kafka_errors.GroupCoordinatorNotAvailableError:  # so is a broker's before any group
        return {}
    except (kafka_errors.KafkaError, OSError, TimeoutError) as error:
        raise RecurError(
            f"cannot ask the broker at {settings.kafka_bootstrap_servers} for the offsets of group"
            f" {settings.kafka_group_id} ({type(error).__name__}): see that it is up"
        ) from error
    finally:
        await admin.close()
    return {
        place.partition: committed_offset(at.offset, at.metadata)
        for place, at in found.items()
        if place.topic == topic
    }
