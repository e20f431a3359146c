"""The parts of benchmarks/quality.py: what coded moments do to updates and to trainings."""
