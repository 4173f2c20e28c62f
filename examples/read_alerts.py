"""Print alerts as they come; stop after a number of them, if one is given."""

import asyncio
import json
import sys

from aiokafka import AIOKafkaConsumer


async def read(bootstrap: str, topic: str, count: int) -> None:
    """Consume the alerts topic from its beginning."""
    seen: set[str] = set()
    async with AIOKafkaConsumer(
        topic,
        bootstrap_servers=bootstrap,
        auto_offset_reset="earliest",
        isolation_level="read_committed",  # with exactly_once: no alert of an aborted transaction
    ) as alerts:
        async for record in alerts:
            alert = json.loads(record.value)
            if alert["source"] in seen:  # after a crash an alert may come again
                continue
            seen.add(alert["source"])
            reasons = ", ".join(reason["code"] for reason in alert["reasons"])
            print(
                f"{alert['decision']:8} {alert['score']:.3f} {alert['amount']:10.2f}"
                f" {alert['account_id']}: {reasons}",
                flush=True,
            )
            if len(seen) == count:
                return


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("localhost:9092", "alerts", "0")[len(sys.argv) - 1 :]]
    asyncio.run(read(arguments[0], arguments[1], int(arguments[2])))
