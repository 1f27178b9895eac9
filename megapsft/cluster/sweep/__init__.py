"""How a run scales over nodes and splits: points of a sweep, their jobs, and what their runs measured."""
