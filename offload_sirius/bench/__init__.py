"""What a machine can do, measured with the same parts that run a model."""
