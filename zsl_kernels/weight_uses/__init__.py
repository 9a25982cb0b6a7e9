"""Replacements for the operations that use a weight. Their backward passes compute the weight's gradient with its statistics.

A *use* of a weight is an operation of the forward pass that reads it. A probe installs these replacements.

- ``eager``: autograd nodes in C++, for uses that the probe knows from earlier passes.
- ``compiled``: registered ops, which ``torch.compile`` keeps in its graphs.
- ``recorded``: calls of the CUDA backend that the C++ nodes repeat on a device.
"""
