"""The Triton backend: ``backend`` picks the launch; each other file has one kernel or two, with their launches behind them."""
