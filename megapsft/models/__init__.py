"""What a model family is: Hugging Face config to Megatron config, layer spec, table of parameters for both directions."""
