-- Shared by all scripts of the counter; it is put in front of each.
--
-- Numbers stay text throughout. A number in this Lua is a double, exact to 2^53 only; HINCRBY on
-- the text of an integer and HGET of its result are exact to 2^63-1, and so is comparing the
-- texts of two integers by length and then byte by byte.

local FIELDS = {'lastAllocValue', 'dataVersion', 'leaseEnd', 'fence'}

-- The version of a hash that is ours. HINCRBY cannot pass it, and that is its purpose: a server of
-- the original idalloc fails on it instead of cutting beside us unseen.
local CLOSED = '9223372036854775807'

-- Which Redis this is, if it is a master: its process and its replication history. run_id alone would
-- not do: a master that was demoted and promoted again keeps it, with older data.
local function live_fence()
  local run_id = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local replication = redis.call('INFO', 'replication')
  if not string.find(replication, 'role:master', 1, true) then
    error({err = 'READONLY this is a replica, and may lag behind its master'})
  end
  return run_id .. ':' .. string.match(replication, 'master_replid:(%x+)')
end

-- The four fields as text, '' for one that is not there.
local function read_state(key)
  local state = redis.call('HMGET', key, unpack(FIELDS))
  for index = 1, #FIELDS do
    state[index] = state[index] or ''
  end
  return state
end

local function less(a, b)
  if #a ~= #b then
    return #a < #b
  end
  return a < b
end

-- Could it be an ID, or 0? HINCRBY takes no leading zeros, and without them equal numbers are
-- equal texts.
local function is_number(text)
  return (text == '0' or string.match(text, '^[1-9]%d*$') ~= nil) and not less(CLOSED, text)
end

-- Why nothing can be cut from this state; nil if something can.
local function problem(state, floor)
  local last, lease_end, fence = state[1], state[3], state[4]
  -- First of all, for its check that this is a master: what a replica lacks means nothing.
  local live = live_fence()
  if fence == '' and is_number(last) then
    return 'foreign'
  end
  if fence == '' or not is_number(last) or not is_number(lease_end) then
    return 'missing'
  end
  if fence ~= live then
    return 'stale'
  end
  if less(lease_end, floor) then
    return 'passed'
  end
  if not less(last, lease_end) then
    return 'spent'
  end
  return nil
end

-- Moves lastAllocValue up by size, or to the lease's end if that comes first.
local function cut(key, size, lease_end)
  local moved = redis.pcall('HINCRBY', key, 'lastAllocValue', size)
  if type(moved) == 'table' or less(lease_end, redis.call('HGET', key, 'lastAllocValue')) then
    redis.call('HSET', key, 'lastAllocValue', lease_end)
  end
end
