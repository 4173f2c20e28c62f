-- Replace the value of an answer key if it is still the expected one.
-- KEYS: the answer key. ARGV: the expected value, the new one ('' deletes it), its time to live in
--   milliseconds.
-- Returns 1 if the key was replaced, else 0.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then redis.call('DEL', KEYS[1])
else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
