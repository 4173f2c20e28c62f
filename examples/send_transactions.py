"""Send a few transactions of one account: ordinary ones, then a large one."""

import asyncio
import json
import sys
import time
import uuid

from aiokafka import AIOKafkaProducer


async def send(bootstrap: str, topic: str) -> None:
    """Produce JSON with the account id as key, and wait until Kafka has it."""
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all") as producer:
        for amount in (12.50, 9.90, 14.20, 11.00, 2400.00):
            transaction = {
                "transaction_id": str(uuid.uuid4()),
                "account_id": "A0000017",
                "merchant_id": "M0000042",
                "amount": amount,
                "currency": "EUR",
                "timestamp": time.time_ns() // 1_000_000,  # milliseconds
            }
            value = json.dumps(transaction).encode()
            await producer.send_and_wait(topic, value, key=b"A0000017")
            print(f"sent {amount:8.2f}")


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *("localhost:9092", "transactions")[len(sys.argv) - 1 :]]
    asyncio.run(send(arguments[0], arguments[1]))
