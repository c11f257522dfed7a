-- cut_beside(hash; size): cut as a server of the original idalloc does, as long as nobody has taken
-- its hash over. Answers {'cut', first - 1, state after} or {reason, '', state}.
local key, size = KEYS[1], ARGV[1]
live_fence() -- For its check that this is a master.
local before = read_state(key)
if before[4] ~= '' then
  return {'refused', '', before}
end
if not is_number(before[1]) then
  return {'missing', '', before}
end
redis.call('HINCRBY', key, 'dataVersion', 1)
redis.call('HINCRBY', key, 'lastAllocValue', size)
return {'cut', before[1], read_state(key)}
