"""All faults, in the order of the table."""

from __future__ import annotations

from tests.faults.doors import TwoDoors
from tests.faults.fault import Fault
from tests.faults.input import Backwards, Flood, HotAccount, SentTwice, Undecodable
from tests.faults.kafka import BrokerKilled, OneOfThreeBrokers, TopicRecreated
from tests.faults.labels import LabelsLost, LabelStorm
from tests.faults.redis import (
    Eviction,
    RedisClusterFailover,
    RedisEmpty,
    RedisFailover,
    RedisFrozen,
    RedisFull,
    RedisKilled,
    RedisSlow,
    RedisSnapshot,
)
from tests.faults.shutdown import SigtermOfAll
from tests.faults.workers import JoinAndLeave, Sigkill, Zombie

FAULTS: tuple[Fault, ...] = (
    Sigkill(),
    Zombie(),
    JoinAndLeave(),
    TwoDoors(),
    BrokerKilled(),
    OneOfThreeBrokers(),
    TopicRecreated(),
    RedisFrozen(),
    RedisKilled(),
    RedisSnapshot(),
    RedisEmpty(),
    RedisFailover(),
    RedisClusterFailover(),
    LabelsLost(),
    Eviction(),
    RedisFull(),
    RedisSlow(),
    Undecodable(),
    SentTwice(),
    HotAccount(),
    Backwards(),
    SigtermOfAll(),
    Flood(),
    LabelStorm(),
)
