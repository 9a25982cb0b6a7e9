"""What a probe puts in the place of a weight's uses, so that the weight's gradient comes with its statistics.

- ``eager``: autograd nodes of the compiled kernels, for uses that are known from earlier passes.
- ``compiled``: registered ops, which ``torch.compile`` keeps in its graphs.
"""
