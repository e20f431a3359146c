"""Ours beside its peers: the same model, data and ranks, each in processes of its own."""
