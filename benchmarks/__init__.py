"""Speed, measured against peers and against the bare limit. One command each: `python -m benchmarks.loss`,
`loader`, `step`, `epoch`, `startup`."""
