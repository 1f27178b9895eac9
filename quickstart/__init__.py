"""The whole way on a laptop: make data and a model, train, export, draw, sample. `python -m quickstart`."""
