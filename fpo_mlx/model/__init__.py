"""The language model: loading, taps, adapters, and the forward to response rows."""
