"""What several teachers are good for, on classes: one module per table of benchmarks/proof.py."""
