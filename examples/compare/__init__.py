"""Ten optimizers on three tasks: what examples/compare_optimizers.py is made of."""
