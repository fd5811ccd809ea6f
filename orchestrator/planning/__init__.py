"""Which trials run, in what order, and what they cost."""
