"""What happens inside a worker: data, models, and the training loop. Knows nothing of Ray."""
