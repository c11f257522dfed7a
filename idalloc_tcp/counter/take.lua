-- take(hash; size, floor): cut a segment.
-- Answers {'cut', first - 1, state after} or {reason, '', state}.
local key, size, floor = KEYS[1], ARGV[1], ARGV[2]
local before = read_state(key)
local reason = problem(before, floor)
if reason then
  return {reason, '', before}
end
cut(key, size, before[3])
return {'cut', before[1], read_state(key)}
