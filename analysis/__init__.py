"""Reads a study's Parquet: SQL, statistics and reports. Needs neither torch nor Ray.

Importing this is cheap; DuckDB, pyarrow and the rest are imported by the functions that use them.
"""

from analysis.contract import errors
from analysis.contract.errors import QueryError, ResultsError, UserError
from analysis.published.published import import_published
from analysis.report.notebook import Results
from analysis.warehouse.connection import export
from analysis.warehouse.connection import open_results as open
from analysis.warehouse.queries import NamedQuery, named_queries
from analysis.warehouse.queries import answer as run
from analysis.warehouse.sandbox import query

__all__ = [
    "NamedQuery",
    "QueryError",
    "Results",
    "ResultsError",
    "UserError",
    "errors",
    "export",
    "import_published",
    "named_queries",
    "open",
    "query",
    "run",
]
