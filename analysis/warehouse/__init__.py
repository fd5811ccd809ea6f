"""Results as a database: views, named questions, and SQL by strangers."""
