-- probe(hash): try what the counter's scripts do, in ways that change nothing: the amount is not a
-- number, and a value lacks its field. Permissions, the role and room are checked before that.
-- Answers for each attempt its command and its error, '' for none.
local function attempt(command, ...)
  local answer = redis.pcall(command, ...)
  return type(answer) == 'table' and answer.err and command .. ': ' .. answer.err or ''
end

local key = KEYS[1]
return {
  attempt('INFO', 'server'),
  attempt('INFO', 'replication'),
  attempt('HMGET', key, 'fence'),
  attempt('HINCRBY', key, 'lastAllocValue', 'none'),
  attempt('HSET', key, 'fence', '', 'leaseEnd'),
}
