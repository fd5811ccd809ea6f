"""What a study file says, and the trials that it means."""
