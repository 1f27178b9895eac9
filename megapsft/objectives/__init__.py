"""What is minimised: one objective a file, and the file name is its name in `objective.name`.

To add one: a file with one frozen dataclass over `_per_token.PerToken`, and its test. Nothing else keeps a list.
"""
