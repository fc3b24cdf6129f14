-- Prints what wrk measured as one line of JSON, the last of its output. Times are in microseconds.
function done(summary, latency)
   local errors = summary.errors
   print(string.format(
      '\n{"requests": %d, "duration": %d, "p50": %d, "p99": %d, "bad_status": %d, "socket_errors": %d}',
      summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), errors.status,
      errors.connect + errors.read + errors.write + errors.timeout))
end
