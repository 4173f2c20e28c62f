-- Write the notes of scored transactions.
-- keys: from place `first` on, for each transaction the key of its note and that of its merchant's
--   profile.
-- expiry: the time to live in milliseconds.
-- scored: 11 bytes for each transaction: the hash of its id, and the decision and the weight as a
--   note holds them.
-- A label may have come before. The note keeps the label's time, and its weight if it has one.
-- A fraud that such a label recorded gets the weight of the new note.
-- It sets first and looks afterwards, because almost always there is no note: one call.
local function write_notes(keys, first, expiry, scored)
  local call, place = redis.call, first - 2
  for at = 1, #scored, 11 do
    place = place + 2
    local key, profile = keys[place], keys[place + 1]
    local note = string.sub(scored, at + 8, at + 10)
    if not call('SET', key, note, 'NX', 'PX', expiry) then
      local id = string.sub(scored, at, at + 7)
      local before = call('GET', key)
      if before and #before == LABELLED_NOTE_BYTES then
        if string.byte(before, 3) == 1 then
          note = string.sub(note, 1, 1) .. string.sub(before, 2, 3)
        elseif string.byte(before, 2) ~= string.byte(note, 2) then
          local value = call('GET', profile)
          if value and #value > FIXED_BYTES and string.byte(value) == PROFILE_FORMAT
              and (#value - FIXED_BYTES) % FRAUD_BYTES == 0 then
            for entry = FIXED_BYTES + 1, #value, FRAUD_BYTES do
              if string.sub(value, entry, entry + 7) == id then
                call('SETRANGE', profile, entry + 11, string.sub(note, 2, 2))
              end
            end
          end
        end
        note = note .. string.sub(before, 4)
      end
      call('SET', key, note, 'PX', expiry)
    end
  end
end
