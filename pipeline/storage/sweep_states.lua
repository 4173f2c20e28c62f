-- Delete states that lie past the watermark and states of another format: both count as absent.
-- KEYS: the watermark, then states.
-- ARGV: the format of states.
-- Returns how many states it deleted.
local next_offset = struct.unpack('<i8', redis.call('GET', KEYS[1]), 9)
local swept = 0
for i = 2, #KEYS do
  local head = redis.call('GETRANGE', KEYS[i], 0, 23)
  if #head < 24 or string.byte(head) ~= tonumber(ARGV[1])
      or struct.unpack('<i8', head, 17) >= next_offset then
    swept = swept + redis.call('DEL', KEYS[i])
  end
end
return swept
