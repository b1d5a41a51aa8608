"""Any transformers model as a source of canonical features: what it can give, how it is made, where it comes from."""
