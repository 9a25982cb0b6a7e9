"""The Triton backend.

``backend`` selects the launch of a call. ``tiles`` contains helpers that the kernels share. Each other file contains one or two
kernels, followed by the functions that launch them.
"""
