-- Reads one body per line from standard input, posts them in turn, and prints one line of JSON at the end.
local requests = {}
local at = 0

function init(_)
  local headers = { ["Content-Type"] = "application/json" }
  for body in io.lines() do
    requests[#requests + 1] = wrk.format("POST", nil, headers, body)
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency, _)
  local errors = summary.errors
  local failures = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    '{"requests": %d, "seconds": %f, "p50_us": %f, "p99_us": %f, "failures": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99), failures
  ))
end
