"""Reads a study's Parquet: SQL, statistics and reports. Needs neither torch nor Ray.

Importing this is cheap; DuckDB, pyarrow and the rest are imported by the functions that use them.
"""

from analysis.errors import QueryError, ResultsError, UserError
from analysis.published import import_published
from analysis.queries import NamedQuery, named_queries, run
from analysis.sandbox import query
from analysis.warehouse import export, open

__all__ = [
    "NamedQuery",
    "QueryError",
    "ResultsError",
    "UserError",
    "export",
    "import_published",
    "named_queries",
    "open",
    "query",
    "run",
]
