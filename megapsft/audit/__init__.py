"""What training would make of a file, row by row: which tokens are trained, what is dropped, and what is wrong with it."""
