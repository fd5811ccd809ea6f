"""One trial: from a subject and a fixer to a row."""
