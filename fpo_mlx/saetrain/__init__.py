"""Training a sparse autoencoder on a model's activations. Importing this loads no MLX."""
