"""Where the data of named subjects come from."""
