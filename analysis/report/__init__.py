"""The report, as a page, Markdown, JSON and LaTeX."""
