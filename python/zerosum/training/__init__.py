"""Training a small GPT on local text, and measuring zero-sum learning on the way.

``model`` and ``data`` stand alone; ``loop`` trains and measures; ``run`` keeps what was measured; ``summary`` says
it in words; ``demo`` puts them together.
"""
