-- Prints what wrk measured as one line of JSON, the last of its output. Times are in microseconds.
local keys = tonumber(os.getenv("KEYS") or "0")
if keys > 0 then
   math.randomseed(7)
   request = function()
      return wrk.format(nil, "/api/stock/item" .. math.random(0, keys - 1))
   end
end

function done(summary, latency)
   local errors = summary.errors
   print(string.format(
      '\n{"requests": %d, "duration": %d, "p50": %d, "p99": %d, "bad_status": %d, "socket_errors": %d, '
      .. '"connect": %d, "read": %d, "write": %d, "timeout": %d}',
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors.status,
      errors.connect + errors.read + errors.write + errors.timeout, errors.connect, errors.read, errors.write,
      errors.timeout))
end
