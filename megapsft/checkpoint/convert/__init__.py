"""Weights from one format to the other: in windows that bounded memory holds, resumable, accounted for to the last tensor."""
