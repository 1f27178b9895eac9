"""Formats of files, byte by byte: where in them each tensor lies, and reads and writes of those places."""
