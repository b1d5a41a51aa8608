"""The arms of benchmarks/peers.py: what is measured, on mtkd's side and on the peers'."""
