"""One thin module for each framework; none is imported unless asked for."""
