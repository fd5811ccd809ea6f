"""A user's own model and data, as a subject file says."""
