"""Stages of training, one after the other, and what each did to the model."""
