"""What gpu_check.py checks and measures, a file for each thing."""
