"""From hidden states to quantities of each token over the whole vocabulary: statistics, and three ways to compute them."""
