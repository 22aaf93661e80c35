"""memserve: an embedding server with a memory for each user.

Importing this package imports neither Ray nor PyTorch.
"""

__version__ = "0.1.0"
