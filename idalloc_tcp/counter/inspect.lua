-- inspect(hash): {1 if the fence is the live one else 0, state}.
local state = read_state(KEYS[1])
return {state[4] == live_fence() and 1 or 0, state}
