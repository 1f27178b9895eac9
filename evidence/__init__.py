"""The papers' findings at laptop scale, from nothing to a report: `make evidence`."""
