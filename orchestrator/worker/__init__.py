"""The process that runs trials, and what watches over it."""
