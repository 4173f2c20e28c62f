-- Subtract transactions from the counts of a profile.
-- KEYS: the profile.
-- ARGV: pairs of a bucket and the number to subtract. A bucket that left the ring is skipped.
-- Returns 1, or 0 if there is no profile of this format.
local head = redis.call('GETRANGE', KEYS[1], 0, HEADER_BYTES - 1)
if #head < HEADER_BYTES or string.byte(head) ~= PROFILE_FORMAT then return 0 end
local newest = struct.unpack('>I4', head, 5)
for i = 1, #ARGV, 2 do
  local bucket = tonumber(ARGV[i])
  if bucket <= newest and bucket > newest - BUCKETS then
    redis.call('BITFIELD', KEYS[1], 'OVERFLOW', 'SAT', 'INCRBY', 'u16',
      '#' .. (HEADER_BYTES / 2 + bucket % BUCKETS), '-' .. ARGV[i + 1])
  end
end
return 1
