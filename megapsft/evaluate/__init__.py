"""How well a policy answers benchmarks."""
