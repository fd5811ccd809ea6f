"""Studies: planning, scheduling on Ray, evaluating and storing. Heavy imports happen where they are used."""
