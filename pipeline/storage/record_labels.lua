-- Record labels in the profiles of one slot, each label once.
-- KEYS: the slot's watermark of the labels partition, profiles, then the note of each label's
--   transaction.
-- ARGV: the time to live in milliseconds, the number of profiles, an empty profile, the offsets
--   where the labels begin and end, 39 bytes for each label, the time to live of a note.
--   The 39 bytes: number of its profile, offset, 1 for fraud, 1 if it has a weight, 1 if it came
--   after a note's time to live, when it became known, the entry of the profile.
-- Returns for each label '' if it was recorded before, 'stale' if a newer one of its transaction
--   was, else the decision on its transaction. Returns a number if it recorded nothing: the slot
--   has only the labels before that offset.
local recorded_to = tonumber(redis.call('GET', KEYS[1]) or '0')
if recorded_to < tonumber(ARGV[4]) then return recorded_to end
local profiles, labels = tonumber(ARGV[2]), ARGV[6]
local fixed, frauds, changed, notes, replies = {}, {}, {}, {}, {}
local function known_frauds(p)
  if not frauds[p] then
    local value = redis.call('GET', KEYS[1 + p])
    fixed[p], frauds[p] = ARGV[3], {}
    if value and #value >= FIXED_BYTES and string.byte(value) == PROFILE_FORMAT
        and (#value - FIXED_BYTES) % FRAUD_BYTES == 0 then
      fixed[p] = string.sub(value, 1, FIXED_BYTES)
      for at = FIXED_BYTES + 1, #value, FRAUD_BYTES do
        table.insert(frauds[p], string.sub(value, at, at + FRAUD_BYTES - 1))
      end
    end
  end
  return frauds[p]
end
local function note_of(key)
  local note = notes[key] or redis.call('GET', key)
  if note and (#note == NOTE_BYTES or #note == LABELLED_NOTE_BYTES) then return note end
  return string.char(0, WEIGHT_MAX, 0)
end
for i = 1, #labels / 39 do
  local at = 39 * i - 38
  local p, offset, is_fraud, has_weight, is_late, when = struct.unpack('>I4I8BBBI8', labels, at)
  local key = KEYS[1 + profiles + i]
  local note = note_of(key)
  if offset < recorded_to then
    replies[i] = ''
  elseif #note == LABELLED_NOTE_BYTES and when < struct.unpack('>I6', note, 4) then
    replies[i] = STALE
  else
    local entry = string.sub(labels, at + 23, at + 38)
    local id, weight, known = string.sub(entry, 1, 8), string.sub(entry, 13, 13),
      string.sub(entry, 14, 16)
    replies[i] = DECISION_OF[string.byte(note)] or (is_late == 1 and UNKNOWN or APPROVE)
    if has_weight == 1 then
      note = string.sub(note, 1, 1) .. weight .. string.char(1)
    else
      note = string.sub(note, 1, 3)
      weight = string.sub(note, 2, 2)
    end
    notes[key] = note .. struct.pack('>I6', when)
    local oldest = struct.unpack('>I3', known) - FRAUD_BUCKETS_MAX
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
      while #kept > FRAUDS_MAX do table.remove(kept, 1) end
    end
    if is_fraud == 1 or was_known then frauds[p], changed[p] = kept, true end
  end
end
for p in pairs(changed) do
  redis.call('SET', KEYS[1 + p], fixed[p] .. table.concat(frauds[p]), 'PX', ARGV[1])
end
for key, note in pairs(notes) do redis.call('SET', key, note, 'PX', ARGV[7]) end
if tonumber(ARGV[5]) > recorded_to then redis.call('SET', KEYS[1], ARGV[5]) end
return replies
