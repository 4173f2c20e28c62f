-- Set a key only if it does not exist; Redis before 7.0 has no SET with both NX and GET.
-- KEYS: the key. ARGV: its value, its time to live in milliseconds.
-- Returns the value that stood there before, or false.
local found = redis.call('GET', KEYS[1])
if not found then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2]) end
return found
