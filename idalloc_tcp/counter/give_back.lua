-- give_back(hash; before, last): take the tail (before, last] back, if this is the Redis that it
-- was cut from and nothing was cut after it. Answers 1 or 0.
local key, before, last = KEYS[1], ARGV[1], ARGV[2]
local state = read_state(key)
if state[4] ~= live_fence() or state[1] ~= last then
  return 0
end
redis.call('HSET', key, 'lastAllocValue', before)
return 1
