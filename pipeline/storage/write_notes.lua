-- Write the notes of scored transactions.
-- KEYS: for each transaction the key of its note and the key of its merchant's profile.
-- ARGV: the time to live in milliseconds, then 11 bytes for each transaction (notes.lua).
-- Returns the number of keys.
write_notes(KEYS, 1, ARGV[1], ARGV[2])
return #KEYS
