"""Embeddings of captions: text encoders, a cache of what they give, folders of captioned images."""
