"""From files to samples: where they are found, how they are read, divided and streamed."""
