"""All faults, in the order of the table."""

from __future__ import annotations

from faults.fault import Fault
from faults.of_everything import SigtermOfAll
from faults.of_input import Backwards, Flood, HotAccount, SentTwice, Undecodable
from faults.of_kafka import BrokerKilled, OneOfThreeBrokers, TopicMadeAgain
from faults.of_labels import LabelsLost, LabelStorm
from faults.of_redis import (
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
from faults.of_workers import JoinAndLeave, Sigkill, Zombie

FAULTS: tuple[Fault, ...] = (
    Sigkill(),
    Zombie(),
    JoinAndLeave(),
    BrokerKilled(),
    OneOfThreeBrokers(),
    TopicMadeAgain(),
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
