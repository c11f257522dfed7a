-- take_over(hash): make a hash of the original idalloc ours, with an empty lease. From here on a
-- server of the original fails on its version. Answers {'spent' or 'refused', '', state}.
local key = KEYS[1]
local fence = live_fence()
local state = read_state(key)
if state[4] ~= '' or not is_number(state[1]) then
  return {'refused', '', state}
end
redis.call('HSET', key, 'dataVersion', CLOSED, 'leaseEnd', state[1], 'fence', fence)
return {'spent', '', read_state(key)}
