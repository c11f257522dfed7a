-- extend(hash; old_end, new_end): move the lease's end, if this is the Redis that it was seated
-- on and the end is still the old one. Answers 1 or 0.
local key, old_end, new_end = KEYS[1], ARGV[1], ARGV[2]
local state = read_state(key)
if state[4] ~= live_fence() or state[3] ~= old_end then
  return 0
end
redis.call('HSET', key, 'leaseEnd', new_end)
return 1
