"""Files and folders that a user names for results: looked at before anything runs, and written whole."""
