"""All parts of a gateway, wired from the settings, and their start and stop."""

from __future__ import annotations

import secrets

from aiokafka.errors import KafkaError

from model.checkpoint import Checkpoint
from pipeline.errors import StartupError
from pipeline.gateway.accounts import AccountService
from pipeline.gateway.alert_feed import AlertFeed
from pipeline.gateway.audit import AuditLog
from pipeline.gateway.gateway_metrics import GatewayMetrics
from pipeline.gateway.incoming import TransactionReader
from pipeline.gateway.log_producer import LogProducer
from pipeline.gateway.problems import CONFLICT, Problem
from pipeline.gateway.protection import make_authenticator, make_limiter
from pipeline.gateway.readiness import Readiness
from pipeline.gateway.score_search import ScoreSearch
from pipeline.gateway.score_service import ScoreService
from pipeline.gateway.waiting import Waiters
from pipeline.gateway.what_if import WhatIfService
from pipeline.kafka.acl import check_gateway_permissions
from pipeline.kafka.log_reader import LogReader
from pipeline.kafka.polls import LogUnavailableError
from pipeline.kafka.topics import TopicRole, ensure_topics
from pipeline.messages.replies import content_hash
from pipeline.scoring.outages import Outages
from pipeline.settings import Settings
from pipeline.storage.answer_store import CLAIM_KEY, AnswerStore
from pipeline.storage.keys import GatewayKeys, Keys
from pipeline.storage.merchant_store import RedisMerchantStore
from pipeline.storage.state_store import RedisStateStore
from pipeline.storage.subscription import Subscription

TOPICS: tuple[TopicRole, ...] = ("transactions", "scores", "alerts", "labels")
"""Topics that a gateway reads or writes, besides the audit topic. It has no right on others."""


class Gateway:
    """The parts of a gateway.

    Args:
        settings: names, limits and addresses.
        checkpoint: the workers'.

    Attributes:
        id: names this process for replies; new at each start.
        scores, what_ifs, accounts, alerts: what the routes call; there after :meth:`start`.
    """

    scores: ScoreService
    what_ifs: WhatIfService
    accounts: AccountService
    transactions: TransactionReader
    partitions: int

    def __init__(self, settings: Settings, checkpoint: Checkpoint) -> None:
        self.settings = settings
        self.checkpoint = checkpoint
        self.id = secrets.token_hex(8)
        self.metrics = GatewayMetrics()
        self.outages = Outages()
        self.states = RedisStateStore.from_settings(settings, checkpoint.digest)
        self.redis = self.states.redis
        self.merchants = RedisMerchantStore.from_settings(settings)
        keys = Keys(settings.redis_key_prefix, checkpoint.digest, settings.topic("transactions"))
        self._expiry_ms = round(settings.answer_seconds * 1000)
        self.answers = AnswerStore(self.redis, keys, self._expiry_ms)
        self._keys = GatewayKeys(settings.redis_key_prefix)
        self.waiters = Waiters()
        self.metrics.waiting.set_function(lambda: float(len(self.waiters)))
        self._subscription = Subscription(
            self.redis.client,
            keys.replies(self.id),
            self._take_replies,
            lambda why: self.outages.failed("replies", why),
        )
        self.reader = LogReader(settings)
        self.search = ScoreSearch(settings, self.reader)
        self.producer = LogProducer(settings)
        self.alerts = AlertFeed(settings, self.reader)
        self.audit = AuditLog(settings)
        self.authenticator = make_authenticator(settings, self.redis)
        self.limiter = make_limiter(settings, self.redis)
        self.readiness = Readiness(
            settings, self.reader, self.redis, self._subscription, self.outages, self.metrics
        )

    def _take_replies(self, message: bytes) -> None:
        try:
            self.metrics.replies.inc(self.waiters.take(message))
        except ValueError:
            self.outages.failed("replies", "a message that no worker writes")

    async def start(self) -> None:
        """Connect to the services.

        Raises:
            RecurError: one of them does not answer; the message says what to do.
        """
        settings = self.settings
        await check_gateway_permissions(settings)
        self.partitions = (await ensure_topics(settings, TOPICS))["transactions"]
        try:
            await self.reader.start([settings.topic(role) for role in TOPICS])
            await self.producer.start()
        except (LogUnavailableError, KafkaError, OSError) as error:
            raise StartupError(
                f"the broker at {settings.kafka_bootstrap_servers} does not answer"
                f" ({type(error).__name__}): see that it is up, or correct"
                " RECUR_KAFKA_BOOTSTRAP_SERVERS"
            ) from error
        await self.audit.start()
        self.transactions = TransactionReader(settings, self.checkpoint, self.partitions)
        self.scores = ScoreService(
            settings, self.id, self.answers, self.producer, self.search, self.waiters, self.metrics
        )
        self.what_ifs = WhatIfService(
            settings, self.checkpoint, self.states, self.merchants, self.transactions.extra_fields
        )
        self.accounts = AccountService(self.checkpoint, self.states, self.search, self.partitions)
        self._subscription.start()
        await self.readiness.start()

    async def stop(self) -> None:
        """Disconnect; records under way are confirmed first."""
        await self.readiness.stop()
        await self._subscription.stop()
        await self.scores.stop()
        await self.producer.stop()
        await self.audit.stop()
        await self.reader.stop()
        await self.merchants.close()
        await self.states.close()

    async def remember(self, principal: str, key: str, body: bytes) -> None:
        """Bind a principal's Idempotency-Key to a body.

        Raises:
            Problem: another body came under the key (409).
            StoreUnavailableError: Redis does not answer.
        """
        content = content_hash(body)
        keys = [self._keys.idempotency(principal, key)]
        command = CLAIM_KEY.call(keys, content, b"%d" % self._expiry_ms)
        (found,) = await self.redis.execute([command])
        if found is not None and found != content:
            raise Problem(CONFLICT, "another body came under this Idempotency-Key")
