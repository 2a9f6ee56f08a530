-- Publish a batch of results: all of it, or nothing. The heart of exactly-once (redis_client.py).
--
-- Redis runs a script alone and writes its effects to the AOF as one transaction, so a crash
-- leaves either everything below or nothing. The fence comes before the first write. Every key
-- is written by this product only, so no write can fail half-way for its type; out of memory
-- refuses the first write, never a later one.
--
-- KEYS 1 next offset of (group, topic, partition)  2 alerts  3 cameras  4 dead letters by reason
--      5 frames of cameras that are not listed
-- ARGV 1 first offset  2 next offset  3 prefix  4 scores kept  5 alerts kept  6 alert k  7 alert n
--      8 seconds over which a camera's rates are smoothed
--      9 cameras listed at most
--      10 number of dead-letter reasons, then that many pairs: reason, count
--      then number of fields F, F field names, and the results: F values each
-- Returns {1, alerts raised} or {0, stored offset}. Offsets are compared as text: Lua's numbers
-- are doubles and would round them beyond 2^53.

local first, next_offset, prefix = ARGV[1], ARGV[2], ARGV[3]
local scores_kept, alerts_kept = ARGV[4], ARGV[5]
local alert_k, alert_n = tonumber(ARGV[6]), tonumber(ARGV[7])
local smoothed_s, max_cameras = tonumber(ARGV[8]), tonumber(ARGV[9])

local stored = redis.call('GET', KEYS[1])
if stored and stored ~= first then
  return {0, stored}
end

local at = 10
local function take()
  at = at + 1
  return ARGV[at - 1]
end

for _ = 1, tonumber(take()) do
  local reason = take()
  redis.call('HINCRBY', KEYS[4], reason, take())
end

local num_fields = tonumber(take())
local names = {}
for i = 1, num_fields do names[i] = take() end

-- One camera's state, read once per batch and written once. Camera ids come from outside: beyond
-- max_cameras a new one is not listed, and nothing is kept under its name. Its alerts are raised,
-- by what this batch alone says of it.
local cameras, num_listed, unlisted = {}, redis.call('ZCARD', KEYS[3]), 0
local function state_of(camera)
  if not cameras[camera] then
    local key = prefix .. ':camera:' .. camera
    local listed = redis.call('ZSCORE', KEYS[3], camera)
    if not listed and num_listed < max_cameras then
      listed, num_listed = true, num_listed + 1
    end
    local had = redis.call('HMGET', key, 'recent', 'rate_at', 'rate_s', 'rate_frames',
      'rate_alerts', 'alert_k', 'alert_n')
    cameras[camera] = {
      key = key, listed = listed, recent = had[1] or '', frames = 0, anomalies = 0, alerts = 0,
      rate_at = had[2] and tonumber(had[2]), rate_s = tonumber(had[3] or 0),
      rate_frames = tonumber(had[4] or 0), rate_alerts = tonumber(had[5] or 0),
      k = tonumber(had[6] or alert_k), n = tonumber(had[7] or alert_n),
    }
  end
  return cameras[camera]
end

-- Sums of seconds, frames and alerts that fade with age: their quotients are the camera's rates of
-- the last smoothed_s or so. By the scorer's clock; a camera's own may be anything. Frame by frame,
-- so that it does not matter how frames came in batches. Scorers' clocks differ a little: time
-- stands still then. From one that was far ahead nothing follows for now: begun anew.
local function fade(state, scored_at)
  local now = tonumber(scored_at) / 1e9
  if not state.rate_at or state.rate_at > now + smoothed_s then
    state.rate_at, state.rate_s, state.rate_frames, state.rate_alerts = now, 0, 0, 0
  end
  now = math.max(now, state.rate_at)
  local kept = math.exp((state.rate_at - now) / smoothed_s)
  state.rate_s = state.rate_s * kept + smoothed_s * (1 - kept)
  state.rate_frames = state.rate_frames * kept + 1
  state.rate_alerts = state.rate_alerts * kept
  state.rate_at = now
end

local function store(camera, state)
  local last = state.last
  redis.call('HSET', state.key, 'recent', state.recent, 'last_captured_at', last.captured_at,
    'last_scored_at', last.scored_at, 'last_score', last.score, 'last_frame', last.frame,
    'threshold_used', last.threshold, 'model', last.model, 'version', last.version)
  for _, name in ipairs({'rate_at', 'rate_s', 'rate_frames', 'rate_alerts'}) do
    redis.call('HSET', state.key, name, string.format('%.17g', state[name]))
  end
  if state.last_alert then
    redis.call('HSET', state.key, 'last_alert_at', state.last_alert.captured_at,
      'last_alert_frame', state.last_alert.frame, 'last_alert_evidence', state.last_alert.evidence)
  end
  redis.call('HINCRBY', state.key, 'frames', state.frames)
  redis.call('HINCRBY', state.key, 'anomalies', state.anomalies)
  redis.call('HINCRBY', state.key, 'alerts', state.alerts)
  -- Score: seconds; a double holds them with microseconds to spare.
  redis.call('ZADD', KEYS[3], tonumber(last.captured_at) / 1e9, camera)
end

local raised = 0
while at <= #ARGV do
  local value, entry = {}, {}
  for i = 1, num_fields do
    local v = take()
    value[names[i]] = v
    entry[2 * i - 1], entry[2 * i] = names[i], v
  end
  local state = state_of(value.camera)
  state.frames = state.frames + 1
  state.last = value
  fade(state, value.scored_at)
  state.recent = string.sub(state.recent .. value.anomaly, -state.n)
  if state.listed then
    redis.call('XADD', prefix .. ':scores:' .. value.camera, 'MAXLEN', '~', scores_kept, '*',
      unpack(entry))
  else
    unlisted = unlisted + 1
  end
  if value.anomaly == '1' then
    state.anomalies = state.anomalies + 1
    local _, among_recent = string.gsub(state.recent, '1', '')
    if among_recent >= state.k then
      state.alerts = state.alerts + 1
      state.rate_alerts = state.rate_alerts + 1
      state.last_alert = value
      raised = raised + 1
      redis.call('XADD', KEYS[2], 'MAXLEN', '~', alerts_kept, '*', unpack(entry))
    end
  end
end

for camera, state in pairs(cameras) do
  if state.listed then
    store(camera, state)
  end
end

if unlisted > 0 then
  redis.call('INCRBY', KEYS[5], unlisted)
end

redis.call('SET', KEYS[1], next_offset)
return {1, raised}
