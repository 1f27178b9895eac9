"""Pictures and tables of runs, drawn from the records that they left."""
