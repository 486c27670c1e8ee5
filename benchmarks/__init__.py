"""Speed measurements: `python -m benchmarks` runs them, one file a case, and writes a table and JSON."""
