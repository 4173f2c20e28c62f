-- Save a partition's states, notes, answers and watermark, if the watermark is the expected one.
-- KEYS: the watermark, then states, then for each note its key and its merchant's profile, then
--   answers.
-- ARGV: the expected watermark ('' if there is none), the new watermark, the number of states,
--   their time to live in milliseconds, that of notes, 11 bytes for each note (notes.lua), then
--   states ('' deletes one), then the time to live of answers, and the answers; none without any.
-- Returns the watermark that stands afterwards.
-- Notes come first: if one cannot be written, the script ends and the states stay as they were.
-- A rejection replaces no answer with a score: its record came again with another content.
local current = redis.call('GET', KEYS[1]) or ''
if current ~= ARGV[1] then return current end
local states = tonumber(ARGV[3])
write_notes(KEYS, 2 + states, ARGV[5], ARGV[6])
for i = 1, states do
  local key, state = KEYS[1 + i], ARGV[6 + i]
  if state == '' then redis.call('DEL', key)
  else redis.call('SET', key, state, 'PX', ARGV[4]) end
end
for i = 8 + states, #ARGV do
  local key, answer = KEYS[#KEYS - #ARGV + i], ARGV[i]
  if string.sub(answer, 1, 1) ~= REJECTED
      or string.sub(redis.call('GET', key) or '', 1, 1) ~= ANSWERED then
    redis.call('SET', key, answer, 'PX', ARGV[7 + states])
  end
end
redis.call('SET', KEYS[1], ARGV[2])
return ARGV[2]
