"""Where merchants' profiles live: Redis or Redis Cluster.

Workers add to profiles side by side, so nothing here is guarded by a partition's watermark:
transactions are counted in place, at least once. Labels are booked exactly once: a script
changes a slot's profiles together with the offset before which all labels of a partition are
booked in them. It skips what is below that, and books nothing where there is a gap.

What a label needs to know of its transaction is remembered in a note
(:mod:`pipeline.storage.transaction_note`) in the same slot, and with it when the transaction's
newest label
became known: an older one changes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from model.features.merchant import BUCKET_MS, BUCKETS, COUNT_MAX, WEIGHT_MAX
from pipeline.messages.decision import DECISIONS
from pipeline.settings import Settings
from pipeline.storage.client import Command, RedisClient, Script, redis_client
from pipeline.storage.keys import MERCHANT_SLOTS, MerchantKeys, merchant_slot
from pipeline.storage.merchant_profile import (
    EMPTY_VALUE,
    FIXED_BYTES,
    FRAUD_BUCKETS_MAX,
    FRAUD_BYTES,
    FRAUDS_MAX,
    HEAD_NONE,
    HEADER_BYTES,
    PROFILE_FORMAT,
    Fraud,
    encode_frauds,
)
from pipeline.storage.state_store import Intactness
from pipeline.storage.transaction_note import (
    LABELLED_NOTE_BYTES,
    NOTE_BYTES,
    NOTE_EXPIRY_MS,
    STALE,
    UNKNOWN,
    TransactionNote,
)

EXPIRY_MS = FRAUD_BUCKETS_MAX * BUCKET_MS
"""A profile in which nothing is counted for so long goes: 48 days (or up to a day less)."""

KEYS_PER_CALL_MAX = 256
"""A script that counts works on so many profiles, and others get their turn."""

LABELS_PER_CALL_MAX = 256

KEYS_HELD_MAX = 65_536
"""Keys of profiles that are not made anew; one takes half a microsecond, twice a transaction."""

# KEYS: profiles. ARGV: time to live in milliseconds, a bucket, then for each profile u16: how
# many transactions to add. A profile that is not there, or in another format, begins anew.
# It counts first and looks then, for almost always the bucket is in the ring: one call.
COUNT_SCRIPT = Script(
    b"""
local bucket = tonumber(ARGV[2])
local place = bucket %% %(buckets)d
local field = '#' .. (%(header)d / 2 + place)
local text = {}
for i = 1, #KEYS do
  local key = KEYS[i]
  local high, low = string.byte(ARGV[3], 2 * i - 1, 2 * i)
  local n = 256 * high + low
  if not text[n] then text[n] = tostring(n) end
  local found = redis.call('BITFIELD', key, 'GET', 'u8', '0', 'GET', 'u32', '32',
    'OVERFLOW', 'FAIL', 'INCRBY', 'u16', field, text[n])
  local head, counted = found[2], found[3]
  if found[1] ~= %(format)d then
    redis.call('SET', key, struct.pack('>BBBBI4', %(format)d, 0, 0, 0, bucket)
      .. string.rep('\0', 2 * place) .. struct.pack('>I2', n)
      .. string.rep('\0', 2 * (%(buckets)d - 1 - place)), 'PX', ARGV[1])
  else
    if head == %(none)d then head = bucket - %(buckets)d end
    if bucket > head then
      local gap = math.min(bucket - head, %(buckets)d)
      local run = string.rep('\0', 2 * gap - 2) .. struct.pack('>I2', n)
      local first = place - gap + 1
      if first < 0 then
        local front = -2 * first
        redis.call('SETRANGE', key, %(header)d + 2 * (first + %(buckets)d),
          string.sub(run, 1, front))
        run, first = string.sub(run, front + 1), 0
      end
      redis.call('SETRANGE', key, %(header)d + 2 * first, run)
      redis.call('SETRANGE', key, '4', struct.pack('>I4', bucket))
      if math.floor(bucket / 4) > math.floor(head / 4) then  -- another day
        redis.call('PEXPIRE', key, ARGV[1])
      end
    elseif bucket <= head - %(buckets)d then
      if counted then redis.call('BITFIELD', key, 'INCRBY', 'u16', field, '-' .. text[n]) end
    elseif not counted then
      redis.call('BITFIELD', key, 'SET', 'u16', field, '%(most)d')
    end
  end
end
return #KEYS
"""
    % {
        b"header": HEADER_BYTES,
        b"buckets": BUCKETS,
        b"format": PROFILE_FORMAT,
        b"none": HEAD_NONE,
        b"most": COUNT_MAX,
    }
)

# KEYS: for each transaction the key of its note and that of its merchant's profile. ARGV: time to
# live in milliseconds, then 11 bytes for each: hash of its id, decision and weight as in a note. A
# label that came before has told its time, and maybe the weight, and these stay; a fraud that it
# booked gets the weight that is remembered from now on.
REMEMBER_SCRIPT = Script(
    b"""
for i = 1, #KEYS / 2 do
  local key, profile = KEYS[2 * i - 1], KEYS[2 * i]
  local told = string.sub(ARGV[2], 11 * i - 10, 11 * i)
  local id, note = string.sub(told, 1, 8), string.sub(told, 9, 11)
  local before = redis.call('GET', key)
  if before and #before == %(labelled)d then
    if string.byte(before, 3) == 1 then
      note = string.sub(note, 1, 1) .. string.sub(before, 2, 3)
    elseif string.byte(before, 2) ~= string.byte(note, 2) then
      local value = redis.call('GET', profile)
      if value and #value > %(fixed)d and string.byte(value) == %(format)d
          and (#value - %(fixed)d) %% %(fraud)d == 0 then
        for at = %(fixed)d + 1, #value, %(fraud)d do
          if string.sub(value, at, at + 7) == id then
            redis.call('SETRANGE', profile, at + 11, string.sub(note, 2, 2))
          end
        end
      end
    end
    note = note .. string.sub(before, 4)
  end
  redis.call('SET', key, note, 'PX', ARGV[1])
end
return #KEYS
"""
    % {
        b"labelled": LABELLED_NOTE_BYTES,
        b"fixed": FIXED_BYTES,
        b"format": PROFILE_FORMAT,
        b"fraud": FRAUD_BYTES,
    }
)

# KEYS: the slot's watermark of the labels partition, profiles, then for each label the key of
# its transaction's note. ARGV: time to live in milliseconds, how many profiles, an empty
# profile, where the labels begin and end, 39 bytes for each label (which profile, offset, 1 for
# fraud, 1 where it tells its weight, 1 where it comes after a note's time, when it became known,
# entry), a note's time to live. Returns for each label '' where it was booked before, 'stale' where
# a newer one of its transaction was, else the decision on its transaction; a number where nothing
# is booked since the slot is booked only up to there.
BOOK_SCRIPT = Script(
    b"""
local booked_to = tonumber(redis.call('GET', KEYS[1]) or '0')
if booked_to < tonumber(ARGV[4]) then return booked_to end
local profiles, labels = tonumber(ARGV[2]), ARGV[6]
local fixed, frauds, changed, notes, replies = {}, {}, {}, {}, {}
local decisions = {%(decisions)b}
local function known_frauds(p)
  if not frauds[p] then
    local value = redis.call('GET', KEYS[1 + p])
    fixed[p], frauds[p] = ARGV[3], {}
    if value and #value >= %(fixed)d and string.byte(value) == %(format)d
        and (#value - %(fixed)d) %% %(fraud)d == 0 then
      fixed[p] = string.sub(value, 1, %(fixed)d)
      for at = %(fixed)d + 1, #value, %(fraud)d do
        table.insert(frauds[p], string.sub(value, at, at + %(fraud)d - 1))
      end
    end
  end
  return frauds[p]
end
local function note_of(key)
  local note = notes[key] or redis.call('GET', key)
  if note and (#note == %(note)d or #note == %(labelled)d) then return note end
  return string.char(0, %(weight)d, 0)
end
for i = 1, #labels / 39 do
  local at = 39 * i - 38
  local p, offset, is_fraud, is_told, is_late, when = struct.unpack('>I4I8BBBI8', labels, at)
  local key = KEYS[1 + profiles + i]
  local note = note_of(key)
  if offset < booked_to then
    replies[i] = ''
  elseif #note == %(labelled)d and when < struct.unpack('>I6', note, 4) then
    replies[i] = '%(stale)b'
  else
    local entry = string.sub(labels, at + 23, at + 38)
    local id, weight, known = string.sub(entry, 1, 8), string.sub(entry, 13, 13),
      string.sub(entry, 14, 16)
    replies[i] = decisions[string.byte(note)] or (is_late == 1 and '%(unknown)b' or '%(approve)b')
    if is_told == 1 then
      note = string.sub(note, 1, 1) .. weight .. string.char(1)
    else
      note = string.sub(note, 1, 3)
      weight = string.sub(note, 2, 2)
    end
    notes[key] = note .. struct.pack('>I6', when)
    local oldest = struct.unpack('>I3', known) - %(oldest)d
    local kept, was_known = {}, false
    for _, other in ipairs(known_frauds(p)) do
      if string.sub(other, 1, 8) == id then
        known, was_known = string.sub(other, 14, 16), true
      elseif is_fraud == 0 or struct.unpack('>I4', other, 9) > oldest then
        table.insert(kept, other)
      end
    end
    if is_fraud == 1 then
      table.insert(kept, id .. string.sub(entry, 9, 12) .. weight .. known)
      while #kept > %(most)d do table.remove(kept, 1) end
    end
    if is_fraud == 1 or was_known then frauds[p], changed[p] = kept, true end
  end
end
for p in pairs(changed) do
  redis.call('SET', KEYS[1 + p], fixed[p] .. table.concat(frauds[p]), 'PX', ARGV[1])
end
for key, note in pairs(notes) do redis.call('SET', key, note, 'PX', ARGV[7]) end
if tonumber(ARGV[5]) > booked_to then redis.call('SET', KEYS[1], ARGV[5]) end
return replies
"""
    % {
        b"fixed": FIXED_BYTES,
        b"format": PROFILE_FORMAT,
        b"fraud": FRAUD_BYTES,
        b"decisions": ", ".join(f"[{ord(word[0])}] = '{word}'" for word in DECISIONS).encode(),
        b"approve": DECISIONS[0].encode(),
        b"note": NOTE_BYTES,
        b"labelled": LABELLED_NOTE_BYTES,
        b"weight": WEIGHT_MAX,
        b"stale": STALE.encode(),
        b"unknown": UNKNOWN.encode(),
        b"oldest": FRAUD_BUCKETS_MAX,
        b"most": FRAUDS_MAX,
    }
)

_LABEL_HEAD = struct.Struct(">IQBBBQ")
_TOLD = struct.Struct(">Q")


@dataclass(frozen=True)
class Booking:
    """A label to book.

    Attributes:
        offset: of its record in the labels partition.
        entry: what the merchant's profile holds of it if it is a fraud; its weight counts only
            where the label tells it.
        labelled_ms: when it became known, epoch milliseconds: of a transaction's labels the
            newest one counts, and of two of the same time the one that comes last.
        is_weight_told: the label tells the weight; else the one that is remembered counts.
        is_late: it became known after a note of its transaction would have gone.
    """

    offset: int
    merchant_id: str
    is_fraud: bool
    entry: Fraud
    labelled_ms: int = 0
    is_weight_told: bool = False
    is_late: bool = False

    @property
    def told_weight(self) -> int | None:
        """The weight that the label tells, if it does."""
        return self.entry.weight if self.is_weight_told else None


@dataclass(frozen=True)
class Booked:
    """What became of labels.

    Attributes:
        decisions: on each label's transaction, or ``unknown``; ``stale`` for a label that is
            older than one that came before; None for one that was booked before, or is not booked.
        behind: None, or the offset up to which some slots are booked, before where the labels
            begin: the store lost what is between, and in these slots nothing was booked.
    """

    decisions: list[str | None]
    behind: int | None = None


@dataclass(frozen=True)
class ScoredNote:
    """What a worker notes of a transaction that it scored.

    Attributes:
        decision: on it.
        weight: how far its merchant explains it if it is a fraud.
    """

    merchant_id: str
    transaction_hash: int
    decision: str
    weight: int = WEIGHT_MAX


Counts = Mapping[int, Mapping[str, int]]
"""How many transactions, by time bucket and merchant id."""


class MerchantStore(Protocol):
    """What the worker needs of a store of merchants' profiles."""

    async def load(self, merchant_ids: Sequence[str]) -> list[bytes | None]:
        """Values of profiles; None where there is none.

        Raises:
            StoreUnavailableError: nothing can be said; ask again.
        """

    async def add(self, counts: Counts, notes: Sequence[ScoredNote]) -> None:
        """Count transactions, and remember what labels need to know of some of them.

        Raises:
            StoreUnavailableError: some of it may have been done.
        """

    async def book(self, partition: int, labels: Sequence[Booking], begin: int, end: int) -> Booked:
        """Book all labels of [begin, end) of a labels partition, each once.

        Args:
            labels: in order of their offsets.
            begin: where what is before it is not booked, nothing is; 0 books whatever there is.

        Raises:
            StoreUnavailableError: some may be booked; ask again with the same labels.
        """

    async def booked_to(self, partition: int) -> int:
        """The offset before which all labels of a partition are booked; 0 for none.

        Raises:
            StoreUnavailableError: nothing can be said; ask again.
        """

    async def labels_log(self, partition: int, log_id: bytes | None) -> bytes | None:
        """The id of the log that a labels partition is booked from.

        Args:
            log_id: where none is named, this one is from now on; None: none.

        Raises:
            StoreUnavailableError: nothing can be said; ask again.
        """

    async def begin_labels_log(self, partition: int, log_id: bytes) -> None:
        """Book a partition from another log: nothing of it is booked yet.

        Raises:
            StoreUnavailableError: some of it may have been done; ask again.
        """

    async def close(self) -> None:
        """Give connections back."""


class RedisMerchantStore:
    """Profiles in one Redis or a Redis Cluster.

    Args:
        client: a connected client that returns bytes.
        keys: names the keys.
        labels_topic: full name.

    Attributes:
        intactness: asked before a load is believed; None believes all.
    """

    def __init__(self, client: Any, keys: MerchantKeys, labels_topic: str) -> None:
        self.intactness: Intactness | None = None
        self._calls = RedisClient(client, COUNT_SCRIPT, REMEMBER_SCRIPT, BOOK_SCRIPT)
        self._keys = keys
        self._profile = lru_cache(KEYS_HELD_MAX)(keys.profile)
        self._labels_topic = labels_topic
        self._expiry = b"%d" % EXPIRY_MS
        self._note_expiry = b"%d" % NOTE_EXPIRY_MS

    @classmethod
    def from_settings(cls, settings: Settings) -> RedisMerchantStore:
        """A store on the settings' Redis; connects at the first call."""
        keys = MerchantKeys(settings.redis_key_prefix)
        return cls(redis_client(settings), keys, settings.topic("labels"))

    async def load(self, merchant_ids: Sequence[str]) -> list[bytes | None]:
        """See :class:`MerchantStore`: one MGET, on a cluster one for each slot."""
        if not merchant_ids:
            return []
        found = await self._load(merchant_ids)
        if self.intactness is not None:
            await self.intactness.require(absent=None in found)
        return found

    async def _load(self, merchant_ids: Sequence[str]) -> list[bytes | None]:
        profile = self._profile
        if not self._calls.is_cluster:
            (values,) = await self._calls.execute([("MGET", *map(profile, merchant_ids))])
            return list(values)
        places = by_slot(merchant_ids)
        replies = await self._calls.execute(
            [("MGET", *(profile(merchant_ids[i]) for i in part)) for part in places.values()]
        )
        found: list[bytes | None] = [None] * len(merchant_ids)
        for part, reply in zip(places.values(), replies, strict=True):
            for i, value in zip(part, reply, strict=True):
                found[i] = value
        return found

    async def add(self, counts: Counts, notes: Sequence[ScoredNote]) -> None:
        """See :class:`MerchantStore`: one round trip."""
        commands = [command for bucket in counts for command in self._count(bucket, counts[bucket])]
        if notes:
            commands += self._remember(notes)
        if commands:
            await self._calls.execute(commands)

    def _count(self, bucket: int, counts: Mapping[str, int]) -> list[Command]:
        """The calls that count in one bucket."""
        merchant_ids = list(counts)
        numbers = np.minimum(list(counts.values()), COUNT_MAX).astype(">u2")
        places = [list(range(len(merchant_ids)))]
        if self._calls.is_cluster:
            places = list(by_slot(merchant_ids).values())
        most = KEYS_PER_CALL_MAX
        calls = [part[i : i + most] for part in places for i in range(0, len(part), most)]
        profile = self._profile
        return [
            COUNT_SCRIPT.call(
                [profile(merchant_ids[i]) for i in part],
                self._expiry,
                b"%d" % bucket,
                numbers[part].tobytes(),
            )
            for part in calls
        ]

    def _remember(self, notes: Sequence[ScoredNote]) -> list[Command]:
        """The calls that remember transactions."""
        places = [list(range(len(notes)))]
        if self._calls.is_cluster:
            places = list(by_slot([note.merchant_id for note in notes]).values())
        most = KEYS_PER_CALL_MAX
        calls = [part[i : i + most] for part in places for i in range(0, len(part), most)]
        return [self._remember_call([notes[i] for i in part]) for part in calls]

    def _remember_call(self, notes: Sequence[ScoredNote]) -> Command:
        keys: list[bytes] = []
        told = []
        for note in notes:
            slot = merchant_slot(note.merchant_id)
            keys += self._keys.note(slot, note.transaction_hash), self._profile(note.merchant_id)
            value = TransactionNote().scored(note.decision, note.weight).to_bytes()
            told.append(_TOLD.pack(note.transaction_hash) + value)
        return REMEMBER_SCRIPT.call(keys, self._note_expiry, b"".join(told))

    async def book(self, partition: int, labels: Sequence[Booking], begin: int, end: int) -> Booked:
        """See :class:`MerchantStore`: one round trip, with a script call for each slot."""
        if self.intactness is not None:
            await self.intactness.require(absent=False)
        calls: list[Sequence[int]] = []
        commands: list[Command] = []
        for slot, places in enumerate(places_by_slot(labels)):
            start = begin
            for part, stop in _calls_of(places, labels, end):
                calls.append(part)
                booked = [labels[i] for i in part]
                commands.append(self._book(slot, partition, booked, start, stop))
                start = stop
        replies = await self._calls.execute(commands)
        return booked_of(len(labels), calls, [_told(reply) for reply in replies])

    def _book(
        self, slot: int, partition: int, labels: Sequence[Booking], begin: int, end: int
    ) -> Command:
        """The call that books labels of one slot."""
        place_of: dict[str, int] = {}
        places = [place_of.setdefault(x.merchant_id, 1 + len(place_of)) for x in labels]
        entries = encode_frauds([label.entry for label in labels])
        blob = b"".join(
            _LABEL_HEAD.pack(
                place,
                label.offset,
                label.is_fraud,
                label.is_weight_told,
                label.is_late,
                label.labelled_ms,
            )
            + entry
            for place, label, entry in zip(places, labels, entries, strict=True)
        )
        return BOOK_SCRIPT.call(
            [
                self._keys.labels_watermark(slot, self._labels_topic, partition),
                *map(self._profile, place_of),
                *(self._keys.note(slot, label.entry.id_hash) for label in labels),
            ],
            self._expiry,
            b"%d" % len(place_of),
            EMPTY_VALUE,
            b"%d" % begin,
            b"%d" % end,
            blob,
            self._note_expiry,
        )

    async def booked_to(self, partition: int) -> int:
        """See :class:`MerchantStore`."""
        topic, slots = self._labels_topic, range(MERCHANT_SLOTS)
        keys = [self._keys.labels_watermark(slot, topic, partition) for slot in slots]
        values = await self._calls.execute([("GET", key) for key in keys])
        return min(0 if value is None else int(value) for value in values)

    async def forget_booked(self, partitions: int) -> None:
        """Forget how far labels are booked, so that workers book them again from the log.

        Raises:
            StoreUnavailableError: some may be forgotten; ask again.
        """
        if partitions == 0:
            return
        topic, slots = self._labels_topic, range(MERCHANT_SLOTS)
        await self._calls.execute(
            [("DEL", *self._keys.labels_watermarks(slot, topic, partitions)) for slot in slots]
        )

    async def labels_log(self, partition: int, log_id: bytes | None) -> bytes | None:
        """See :class:`MerchantStore`."""
        key = self._keys.labels_log(self._labels_topic, partition)
        if log_id is not None:
            await self._calls.execute([("SET", key, log_id, "NX")])
        (found,) = await self._calls.execute([("GET", key)])
        return None if found is None else bytes(found)

    async def begin_labels_log(self, partition: int, log_id: bytes) -> None:
        """See :class:`MerchantStore`: the id comes last, so that what is cut off is done again."""
        topic, slots = self._labels_topic, range(MERCHANT_SLOTS)
        keys = [self._keys.labels_watermark(slot, topic, partition) for slot in slots]
        await self._calls.execute([("DEL", key) for key in keys])
        await self._calls.execute([("SET", self._keys.labels_log(topic, partition), log_id)])

    async def close(self) -> None:
        """See :class:`MerchantStore`."""
        await self._calls.close()


def booked_of(
    count: int, parts: Sequence[Sequence[int]], replies: Sequence[list[str | None] | int]
) -> Booked:
    """What became of so many labels: by parts of them, decisions, or up to where was booked."""
    decisions: list[str | None] = [None] * count
    for part, reply in zip(parts, replies, strict=True):
        if not isinstance(reply, int):
            for i, decision in zip(part, reply, strict=True):
                decisions[i] = decision
    behind = [reply for reply in replies if isinstance(reply, int)]
    return Booked(decisions, min(behind, default=None))


def _told(reply: list[bytes] | int) -> list[str | None] | int:
    return reply if isinstance(reply, int) else [word.decode() or None for word in reply]


def by_slot(merchant_ids: Sequence[str]) -> dict[int, list[int]]:
    """Places of the ids by slot, in order."""
    places: dict[int, list[int]] = {}
    for i, merchant in enumerate(merchant_ids):
        places.setdefault(merchant_slot(merchant), []).append(i)
    return places


def places_by_slot(labels: Sequence[Booking]) -> list[list[int]]:
    """Places of the labels, for each slot that there is."""
    places = by_slot([label.merchant_id for label in labels])
    return [places.get(slot, []) for slot in range(MERCHANT_SLOTS)]


def _calls_of(
    places: Sequence[int], labels: Sequence[Booking], end: int
) -> Iterator[tuple[Sequence[int], int]]:
    """A slot's labels, as many as a call takes, and the offset where each call's labels end."""
    most = LABELS_PER_CALL_MAX
    firsts = range(0, max(1, len(places)), most)  # a slot without labels has a call, too
    ends = [labels[places[first]].offset for first in firsts[1:]]
    for first, stop in zip(firsts, [*ends, end], strict=True):
        yield places[first : first + most], stop
