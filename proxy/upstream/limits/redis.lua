-- Limits shared by all proxies that use one Redis: one call for each decision, by the server's clock.
--
-- A window is `<name>:t` (total), `<name>:o` (the oldest slot that still counts) and `<name>:<slot>` in the hash of its
-- limiter. Slot i contains what was admitted in [i * width, (i + 1) * width) ms, and expires when all of it is a whole
-- span old. So no window of the span ever contains more than the limit, and a request waits at most one width too long.
-- Requests in flight are counted by proxy: each proxy publishes its own number, and one that has sent nothing for
-- `LEASE` ms counts as dead. Every key expires. All keys have one hash tag.
--
-- ARGV[1] is what to do; the time is the server's plus ARGV[2] ms (0 except in tests).

local LEASE = 10000
local MOST_SLOTS = 310

local function int(number)
    return string.format('%.0f', number)
end

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000) + tonumber(ARGV[2])

-- Removes what is a whole span old; returns the window's total and its oldest slot.
local function advance(hash, window, span, width)
    local first = math.floor((now - span) / width)
    local kept = redis.call('HMGET', hash, window .. ':t', window .. ':o')
    local total, oldest = tonumber(kept[1] or '0'), tonumber(kept[2] or int(first))
    if oldest >= first then
        return total, oldest
    end
    local fields = {}
    for slot = oldest, math.min(first - 1, oldest + MOST_SLOTS) do
        fields[#fields + 1] = window .. ':' .. int(slot)
    end
    for _, amount in ipairs(redis.call('HMGET', hash, unpack(fields))) do
        total = total - tonumber(amount or '0')
    end
    redis.call('HDEL', hash, unpack(fields))
    redis.call('HSET', hash, window .. ':t', int(total), window .. ':o', int(first))
    return total, first
end

-- Returns the milliseconds until `excess` will have expired.
local function wait(hash, window, span, width, oldest, excess)
    local fields = {}
    for slot = oldest, math.floor(now / width) do
        fields[#fields + 1] = window .. ':' .. int(slot)
    end
    for i, amount in ipairs(redis.call('HMGET', hash, unpack(fields))) do
        excess = excess - tonumber(amount or '0')
        if excess <= 0 then
            return (oldest + i) * width + span - now
        end
    end
    return span
end

-- Adds to one slot, which never falls below 0; returns the change, 0 if the slot has expired.
local function add(hash, window, span, width, stamp, change)
    local total, oldest = advance(hash, window, span, width)
    local slot = math.floor(stamp / width)
    if slot < oldest then
        return 0
    end
    local field = window .. ':' .. int(slot)
    change = math.max(change, -tonumber(redis.call('HGET', hash, field) or '0'))
    redis.call('HINCRBY', hash, field, int(change))
    redis.call('HSET', hash, window .. ':t', int(total + change), window .. ':o', int(oldest))
    redis.call('PEXPIRE', hash, int(math.max(span + width, redis.call('PTTL', hash))))
    return change
end

-- Returns the requests in flight: those of others, and this proxy's: as published, or `count` if that is newer.
local function in_flight(runs, proxy, sequence, count)
    local others, mine, newer = 0, count, true
    local all = redis.call('HGETALL', runs)
    for i = 1, #all, 2 do
        local seen, heard, number = string.match(all[i + 1], '(%d+) (%d+) (%d+)')
        if all[i] == proxy then
            if tonumber(seen) > sequence then
                mine, newer = tonumber(number), false
            end
        elseif tonumber(heard) + LEASE < now then
            redis.call('HDEL', runs, all[i])
        else
            others = others + tonumber(number)
        end
    end
    return others, mine, newer
end

local function tell(runs, proxy, sequence, count)
    redis.call('HSET', runs, proxy, int(sequence) .. ' ' .. int(now) .. ' ' .. int(count))
    redis.call('PEXPIRE', runs, 3 * LEASE)
end

local verb = ARGV[1]

if verb == 'reserve' then
    -- KEYS: epoch, hash, runs, states …; ARGV: epoch, proxy, sequence, its requests in flight, the maximum of all
    -- (-1: none), then for each window: name, limit, span, width, amount.
    -- Returns {1 admitted | 0 wait | 2 another epoch, now, wait in ms (-1: unknown), in flight, states …, totals …}.
    local states = {}
    if #KEYS > 3 then
        states = redis.call('MGET', unpack(KEYS, 4))
        for i, state in ipairs(states) do
            states[i] = state or ''
        end
    end
    if redis.call('GET', KEYS[1]) ~= ARGV[3] then
        return {2, now, -1, 0, states, {}}
    end
    local proxy, sequence, count, most = ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
    local longest, totals, room = 0, {}, true
    local others, mine, newer = 0, count, false
    if most >= 0 then
        others, mine, newer = in_flight(KEYS[3], proxy, sequence, count)
        room = others + mine <= most
    end
    for i = 8, #ARGV, 5 do
        local window, limit, span, width = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
        local total, oldest = advance(KEYS[2], window, span, width)
        totals[#totals + 1] = total
        local excess = total + tonumber(ARGV[i + 4]) - limit
        if excess > 0 then
            longest = math.max(longest, wait(KEYS[2], window, span, width, oldest, excess))
        end
    end
    local admitted = room and longest == 0
    if newer then
        tell(KEYS[3], proxy, sequence, admitted and count or count - 1)
    end
    if not admitted then
        return {0, now, (room or longest > 0) and longest or -1, others + mine, states, totals}
    end
    for i = 8, #ARGV, 5 do
        local amount, at = tonumber(ARGV[i + 4]), (i - 3) / 5
        add(KEYS[2], ARGV[i], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), now, amount)
        totals[at] = totals[at] + amount
    end
    return {1, now, 0, others + mine, states, totals}
end

if verb == 'add' then
    -- KEYS: hash, runs; ARGV: proxy, sequence, its requests in flight (-1: no limit), then for each amount: name, span,
    -- width, stamp, change.
    local count = tonumber(ARGV[5])
    if count >= 0 then
        local _, _, newer = in_flight(KEYS[2], ARGV[3], tonumber(ARGV[4]), count)
        if newer then
            tell(KEYS[2], ARGV[3], tonumber(ARGV[4]), count)
        end
    end
    for i = 6, #ARGV, 5 do
        add(KEYS[1], ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]))
    end
    return now
end

if verb == 'hello' then
    -- KEYS: proxies, epoch, resets, runs …; ARGV: proxy, lifetime of epoch and resets, then for each of the runs:
    -- sequence and the proxy's requests in flight.
    -- Returns {now, the number of proxies, this one's rank, epoch, resets, since when all have sent a heartbeat}.
    redis.call('ZADD', KEYS[1], now, ARGV[3])
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - LEASE)
    redis.call('PEXPIRE', KEYS[1], 3 * LEASE)
    redis.call('SET', KEYS[2], int(now) .. ':' .. ARGV[3], 'NX')
    redis.call('PEXPIRE', KEYS[2], ARGV[4])
    redis.call('PEXPIRE', KEYS[3], ARGV[4])
    for i = 4, #KEYS do
        local sequence, count = tonumber(ARGV[2 * i - 3]), tonumber(ARGV[2 * i - 2])
        local _, _, newer = in_flight(KEYS[i], ARGV[3], sequence, count)
        if newer then
            tell(KEYS[i], ARGV[3], sequence, count)
        end
    end
    local proxies, rank = redis.call('ZRANGE', KEYS[1], 0, -1), 0
    for _, proxy in ipairs(proxies) do
        if proxy < ARGV[3] then
            rank = rank + 1
        end
    end
    return {now, #proxies, rank, redis.call('GET', KEYS[2]), redis.call('GET', KEYS[3]) or '0',
        tonumber(redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2])}
end

if verb == 'look' then
    -- KEYS: hash; ARGV: for each window: name, span, width. Returns their totals.
    local totals = {}
    for i = 3, #ARGV, 3 do
        totals[#totals + 1] = (advance(KEYS[1], ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])))
    end
    return totals
end

if verb == 'learn' then
    -- KEYS: state; ARGV: milliseconds that it lasts (0: it has ended), text. A deadline is extended, never shortened.
    local lasts = tonumber(ARGV[3])
    if lasts <= 0 then
        redis.call('DEL', KEYS[1])
    elseif redis.call('PTTL', KEYS[1]) < lasts then
        redis.call('SET', KEYS[1], ARGV[4], 'PX', ARGV[3])
    end
    return now
end

return redis.error_reply('unknown: ' .. verb)
