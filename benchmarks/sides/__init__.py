"""What benchmarks share: the arms of peers.py, jobs of several runs, tables of paired comparisons."""
