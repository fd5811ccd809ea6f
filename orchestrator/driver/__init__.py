"""The process that runs a study."""
