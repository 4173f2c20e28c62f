-- Save a partition's states and its watermark, if the watermark is the expected one.
-- KEYS: the watermark, then states.
-- ARGV: the expected watermark ('' if there is none), the new watermark, the time to live in
--   milliseconds, then states ('' deletes one).
-- Returns the watermark that stands afterwards.
local current = redis.call('GET', KEYS[1]) or ''
if current ~= ARGV[1] then return current end
for i = 2, #KEYS do
  if ARGV[i + 2] == '' then redis.call('DEL', KEYS[i])
  else redis.call('SET', KEYS[i], ARGV[i + 2], 'PX', ARGV[3]) end
end
redis.call('SET', KEYS[1], ARGV[2])
return ARGV[2]
