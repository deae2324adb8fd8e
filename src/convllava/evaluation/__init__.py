"""How well a model answers: metrics, and benchmarks that run them."""
