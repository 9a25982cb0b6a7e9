"""The portable backend: plain PyTorch on any device, with temporaries of bounded size."""
