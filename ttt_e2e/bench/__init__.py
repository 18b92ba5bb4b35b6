"""Benchmarks: `ttt-e2e bench NAME`. One module each; `compiled` and `table` are what they share."""
