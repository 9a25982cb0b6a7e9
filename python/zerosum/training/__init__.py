"""Trains a small GPT on local text and measures zero-sum learning while it trains.

``model`` and ``data`` do not depend on the other modules. ``loop`` trains and measures. ``run`` stores what was measured.
``summary`` puts the records into words. ``demo`` combines all of them.
"""
