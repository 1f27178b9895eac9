class QuantizedTensor:
    """No tensor of the stand-in is one."""
