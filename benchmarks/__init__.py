"""One script per claim; each measures deltaw and its peer in one process, alternating, and writes results/*.json."""
