-- What proxies have spent and reserved of one account (`account.py`). All amounts are integers of 1e-12 USD, as text:
-- HINCRBY adds them exactly; only comparisons with a limit go through doubles.
--
-- KEYS: the reservations ({process: "seq until amount"}), then a hash for each period ({total, and by process what it
-- has spent}).
-- ARGV: process, seq, ms for which a reservation holds unless it is repeated, amount reserved, that part of it which is
-- new ('' for none), then for each period: spent by the process in it, limit, seconds to live, the least total.
-- A process publishes all that it has spent, never a difference: what is sent twice because a reply was lost counts
-- once.
-- Returns {1 there is room | 0, reserved by others, proxies, and for each period: total, of it the process's own}.

local function less(a, b)
  if #a ~= #b then return #a < #b end
  return a < b
end

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local process, seq, held = ARGV[1], tonumber(ARGV[2]), ARGV[4]

local totals = {}
for i = 2, #KEYS do
  local at = 6 + (i - 2) * 4
  local spent = ARGV[at]
  local known = redis.call('HGET', KEYS[i], process) or '0'
  if less(known, spent) then
    redis.call('HINCRBY', KEYS[i], 'total', spent)
    if known ~= '0' then redis.call('HINCRBY', KEYS[i], 'total', '-' .. known) end
    redis.call('HSET', KEYS[i], process, spent)
    known = spent
  end
  local total = redis.call('HGET', KEYS[i], 'total') or '0'
  if less(total, ARGV[at + 3]) then
    total = ARGV[at + 3]
    redis.call('HSET', KEYS[i], 'total', total)
  end
  redis.call('EXPIRE', KEYS[i], ARGV[at + 2])
  totals[#totals + 1] = total
  totals[#totals + 1] = known
end

local others, proxies, newer = 0, 1, true
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local its, till, amount = string.match(all[i + 1], '^(%d+) (%d+) (%d+)$')
  if all[i] == process then
    newer = seq > tonumber(its)
  elseif not till or tonumber(till) <= now then
    redis.call('HDEL', KEYS[1], all[i])
  else
    others, proxies = others + tonumber(amount), proxies + 1
  end
end

local room = 1
if ARGV[5] ~= '' then
  for i = 2, #KEYS do
    local taken, limit = tonumber(totals[2 * i - 3]) + others + tonumber(held), tonumber(ARGV[7 + (i - 2) * 4])
    if taken > limit or taken - tonumber(ARGV[5]) >= limit then room = 0 end
  end
end
if room == 1 and newer then
  redis.call('HSET', KEYS[1], process, string.format('%d %.0f %s', seq, now + tonumber(ARGV[3]), held))
end
redis.call('EXPIRE', KEYS[1], 86400)
local answer = {room, string.format('%.0f', others), proxies}
for _, total in ipairs(totals) do answer[#answer + 1] = total end
return answer
