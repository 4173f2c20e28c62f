-- Count transactions of one time bucket in merchants' profiles.
-- KEYS: profiles. A missing profile, and one of another format, starts empty.
-- ARGV: the time to live in milliseconds, the bucket, then a u16 for each profile: how many
--   transactions to add.
-- Returns the number of profiles.
-- It adds first and looks afterwards, because almost always the ring holds the bucket: one call.
local bucket = tonumber(ARGV[2])
local place = bucket % BUCKETS
local field = '#' .. (HEADER_BYTES / 2 + place)
local text = {}
for i = 1, #KEYS do
  local key = KEYS[i]
  local high, low = string.byte(ARGV[3], 2 * i - 1, 2 * i)
  local n = 256 * high + low
  if not text[n] then text[n] = tostring(n) end
  local found = redis.call('BITFIELD', key, 'GET', 'u8', '0', 'GET', 'u32', '32',
    'OVERFLOW', 'FAIL', 'INCRBY', 'u16', field, text[n])
  local head, counted = found[2], found[3]
  if found[1] ~= PROFILE_FORMAT then
    redis.call('SET', key, struct.pack('>BBBBI4', PROFILE_FORMAT, 0, 0, 0, bucket)
      .. string.rep('\0', 2 * place) .. struct.pack('>I2', n)
      .. string.rep('\0', 2 * (BUCKETS - 1 - place)), 'PX', ARGV[1])
  else
    if head == HEAD_NONE then head = bucket - BUCKETS end
    if bucket > head then
      local gap = math.min(bucket - head, BUCKETS)
      local run = string.rep('\0', 2 * gap - 2) .. struct.pack('>I2', n)
      local first = place - gap + 1
      if first < 0 then
        local front = -2 * first
        redis.call('SETRANGE', key, HEADER_BYTES + 2 * (first + BUCKETS),
          string.sub(run, 1, front))
        run, first = string.sub(run, front + 1), 0
      end
      redis.call('SETRANGE', key, HEADER_BYTES + 2 * first, run)
      redis.call('SETRANGE', key, '4', struct.pack('>I4', bucket))
      if math.floor(bucket / 4) > math.floor(head / 4) then  -- another day
        redis.call('PEXPIRE', key, ARGV[1])
      end
    elseif bucket <= head - BUCKETS then
      if counted then redis.call('BITFIELD', key, 'INCRBY', 'u16', field, '-' .. text[n]) end
    elseif not counted then
      redis.call('BITFIELD', key, 'SET', 'u16', field, tostring(COUNT_MAX))
    end
  end
end
return #KEYS
