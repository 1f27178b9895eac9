"""From rows in a file to the tensors of an update: rows, chat template, samples, order, weights, packs. No Megatron here."""
