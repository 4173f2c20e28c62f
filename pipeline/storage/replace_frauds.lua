-- Replace the known frauds of profiles, if the slot's labels are recorded as far as expected.
-- KEYS: the slot's watermarks of the labels partitions, then profiles.
-- ARGV: the number of watermarks, the expected ones, the time to live in milliseconds, an empty
--   profile, then the known frauds of each profile.
-- Returns 1, or 0 if it wrote nothing.
local n = tonumber(ARGV[1])
for i = 1, n do
  if (redis.call('GET', KEYS[i]) or '0') ~= ARGV[1 + i] then return 0 end
end
for i = n + 1, #KEYS do
  local value, fixed = redis.call('GET', KEYS[i]), ARGV[3 + n]
  if value and #value >= FIXED_BYTES and string.byte(value) == PROFILE_FORMAT
      and (#value - FIXED_BYTES) % FRAUD_BYTES == 0 then
    fixed = string.sub(value, 1, FIXED_BYTES)
  end
  redis.call('SET', KEYS[i], fixed .. ARGV[3 + i], 'PX', ARGV[2 + n])
end
return 1
