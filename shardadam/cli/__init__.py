"""`python -m shardadam ckpt …`: looks at checkpoints, verifies them, converts them."""
