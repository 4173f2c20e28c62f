-- Write the notes of scored transactions.
-- KEYS: for each transaction the key of its note and the key of its merchant's profile.
-- ARGV: the time to live in milliseconds, then 11 bytes for each transaction: the hash of its id,
--   and the decision and the weight as a note holds them.
-- A label may have come before. The note keeps the label's time, and its weight if it has one.
-- A fraud that such a label recorded gets the weight of the new note.
-- Returns the number of keys.
for i = 1, #KEYS / 2 do
  local key, profile = KEYS[2 * i - 1], KEYS[2 * i]
  local scored = string.sub(ARGV[2], 11 * i - 10, 11 * i)
  local id, note = string.sub(scored, 1, 8), string.sub(scored, 9, 11)
  local before = redis.call('GET', key)
  if before and #before == LABELLED_NOTE_BYTES then
    if string.byte(before, 3) == 1 then
      note = string.sub(note, 1, 1) .. string.sub(before, 2, 3)
    elseif string.byte(before, 2) ~= string.byte(note, 2) then
      local value = redis.call('GET', profile)
      if value and #value > FIXED_BYTES and string.byte(value) == PROFILE_FORMAT
          and (#value - FIXED_BYTES) % FRAUD_BYTES == 0 then
        for at = FIXED_BYTES + 1, #value, FRAUD_BYTES do
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
