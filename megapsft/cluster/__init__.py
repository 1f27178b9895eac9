"""What a run takes of a cluster, before it is queued: memory, time, traffic, and which splits would fit."""
