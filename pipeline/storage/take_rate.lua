-- Takes requests from a rate limit (GCRA), by the server's clock: gateways' clocks may differ.
-- KEYS[1]: the time at which all taken requests would be paid back, microseconds.
-- ARGV: quota, window in microseconds, requests to take.
-- Returns whether they are taken (0 or 1), requests left, microseconds until more are allowed.
local quota, window, cost = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local interval = window / quota
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local stored = tonumber(redis.call('GET', KEYS[1]) or now)
-- Never further than a window ahead: after a change of the limit or of the clock.
local owed = math.min(math.max(stored - now, 0), window)
local after = owed + cost * interval
-- Half a microsecond of tolerance: the division above is rounded.
if after > window + 0.5 then
  return {0, math.floor((window - owed) / interval + 0.001), math.ceil(after - window)}
end
redis.call('SET', KEYS[1], string.format('%.1f', now + after), 'PX', math.ceil(after / 1000))
local left = math.max(0, math.floor((window - after) / interval + 0.001))
local until_more = interval - (window - after - left * interval)
return {1, left, math.ceil(until_more)}
