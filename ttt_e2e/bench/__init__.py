"""Benchmarks, `ttt-e2e bench NAME`, in a module each; they share `compiled`, `flags` and `table`."""
