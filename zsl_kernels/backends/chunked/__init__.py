"""The portable backend, in plain PyTorch, for any device: its temporaries are of bounded size."""
