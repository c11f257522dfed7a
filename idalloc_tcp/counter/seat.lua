-- seat(hash; before, lease_end, size, floor, reason, seen_end): put the counter on the fresh lease
-- (before, lease_end] and cut the first segment, if the reason that `take` gave still holds and
-- the old lease still ends at seen_end ('0': there is none).
-- Answers {'cut', first - 1, state after} or {'refused', '', state}.
local key, before, lease_end, size = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local floor, reason, seen_end = ARGV[4], ARGV[5], ARGV[6]
local state = read_state(key)
local lease_end_now = is_number(state[3]) and state[3] or '0'
if problem(state, floor) ~= reason or lease_end_now ~= seen_end then
  return {'refused', '', state}
end
redis.call('HSET', key, 'lastAllocValue', before, 'dataVersion', CLOSED,
  'leaseEnd', lease_end, 'fence', live_fence())
cut(key, size, lease_end)
return {'cut', before, read_state(key)}
