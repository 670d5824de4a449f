"""Would balancing help this model? Measurements of one checkpoint, and advice drawn from them."""
